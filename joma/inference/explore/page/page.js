// What is chosen, and what follows from it.

const byId = id => document.getElementById(id);
const state = { layer: 0, head: 0, step: numTokens - 1, token: null };
let current = null, shownHead = null;  // A head's numbers, and which it is.
let asked = 0, started = null, timer = null, speech = null;

// Draws at the next frame, however often it is asked until then.
function change(next) {
  started = started ?? performance.now();
  const isOther = ["layer", "head"].some(
    name => next[name] !== undefined && next[name] !== state[name]);
  Object.assign(state, next);
  if (isOther || current === null) open();
  else requestAnimationFrame(draw);
}

async function open() {
  const mine = ++asked;
  const found = await readHead(state.layer, state.head);
  if (mine !== asked) return;  // Another one was chosen meanwhile.
  current = found;
  shownHead = [state.layer, state.head].join();
  requestAnimationFrame(() => {
    drawMaps(current, state.layer, state.head);
    draw();
  });
}

function draw() {
  if (started === null || current === null) return;
  const { layer, head, step, token } = state;
  if (shownHead !== [layer, head].join()) return;  // It is being opened.
  const row = readRow(current, step);
  columns.forEach((column, i) => {
    const left = i ? leftOf(i - 1, layer, head) : null;
    reveal(column, token ?? step);
    drawColumn(column, step, row, current.marks, left);
  });
  drawCross(step, token);
  drawWords(row);
  const begun = started;
  started = null;
  // A task behind this frame: the browser has painted by then.
  setTimeout(() => performance.measure("frame", { start: begun }), 0);
}

function repaint() {
  colours.clear();
  drawPictures();
  if (current) drawMaps(current, state.layer, state.head);
}

// Where a link points, as page.html#layer=3&head=4&step=57.
function fromLink() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const sizes = { layer: header.num_layers, head: header.num_heads,
                  step: numTokens };
  const found = {};
  for (const [name, size] of Object.entries(sizes)) {
    const value = Number.parseInt(wanted.get(name), 10);
    if (value >= 0 && value < size) found[name] = value;
  }
  return found;
}

async function start() {
  Object.assign(state, fromLink());
  makeControls();
  makeLegend();
  makeMaps((step, token) => change({ step, token: token <= step ? token : null }));
  makeColumns(goTo);
  columns[0].tokens.addEventListener("keydown", onTokenKey);
  makeTip();
  columns.forEach(measure);
  makeHeads(index => change({
    layer: Math.floor(index / header.num_heads),
    head: index % header.num_heads,
  }));
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => change(fromLink()));
  await readPolicies();
  await drawPictures();
  change({});
}

start();
