// What is chosen, and what follows from it.

const byId = id => document.getElementById(id);
const state = { layer: 0, head: 0, step: numTokens - 1, token: null };
let current = null;  // The chosen head's numbers.
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
  requestAnimationFrame(() => {
    drawMaps(current, state.layer, state.head);
    draw();
  });
}

function draw() {
  if (started === null || current === null) return;
  const { layer, head, step, token } = state;
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

function stepText(step) {
  const kind = step < header.num_prompt ? "text" : "the model's";
  return `${step} of ${numTokens - 1}, ${quoted(step)} (${kind})`;
}

function drawWords(row) {
  const { layer, head, step } = state;
  byId("layer").value = layer;
  byId("head").value = head;
  byId("step").value = step;
  byId("step").setAttribute("aria-valuetext", stepText(step));
  byId("place").textContent = stepText(step);
  byId("maps-title").textContent = `Layer ${layer}, head ${head}`;
  markHead(layer * header.num_heads + head);
  const order = Array.from({ length: step + 1 }, (_, s) => s)
    .filter(s => row.isStored[s])
    .sort((a, b) => row.levels[b] - row.levels[a] || a - b);
  drawSummary(row, order);
  drawFigures();
  drawTable(row, order.slice(0, 12));
  drawActive(row);
}

function drawFigures() {
  const { layer, head, step } = state;
  const index = layer * header.num_heads + head;
  const { entropy, sink, induction } = header.heads;
  figures[0].said.textContent =
    `entropy ${entropy[index].toFixed(2)} nats, sink mass ` +
    `${sink[index].toFixed(2)}, prefix matching ${induction[index].toFixed(2)}`;
  figures[0].map.setAttribute("aria-label",
    `Map of attention of ${headText(index)}`);
  const nats = loss => loss == null ? "" : `${loss.toFixed(2)} nats`;
  columns[0].said.textContent = `Attention of query ${step}. ` +
    (header.losses[step] == null ? "" :
      `Next token's loss ${nats(header.losses[step])}.`);
  header.policies.forEach((policy, i) => {
    const left = leftOf(i, layer, head);
    let kept = 0;
    const leaves = [];
    for (let s = 0; s <= step; s++) {
      kept += left[s] > step;
      if (left[s] === step) leaves.push(s);
    }
    const share = Math.round(100 * current.shares[i][step] / 255);
    const mean = 100 * policy.shares[index];
    figures[i + 1].said.textContent =
      `keeps ${mean.toFixed(1)} % of this head's attention, mean over decode ` +
      `steps. Hatched: gone; orange: attention to what is gone`;
    figures[i + 1].map.setAttribute("aria-label",
      `What ${policy.label} keeps of the map: ${mean.toFixed(1)} %`);
    const named = leaves.slice(0, 3).map(s => `${quoted(s)} (${s})`).join(", ");
    const more = leaves.length > 3 ? ` and ${leaves.length - 3} more` : "";
    const said = `Keeps ${kept} of ${step + 1} tokens, with ${share} % of this ` +
      `query's attention. ` +
      (leaves.length ? `Leaving now: ${named}${more}. ` : "") +
      (policy.losses[step] == null ? "" :
        `Next token's loss ${nats(policy.losses[step])}.`);
    columns[i + 1].said.textContent = said;
    columns[i + 1].tokens.setAttribute("aria-label", `${policy.label}: ${said}`);
  });
}

function drawSummary(row, order) {
  const first = order.slice(0, 3).map(
    s => `${quoted(s)} (${s}) ${weightText(row, s)}`).join(", ");
  const others = row.others > 0 && row.rest > 0
    ? `; ${row.others} other keys have ${percent(row.rest)} together, each ` +
      `below ${percent(row.bound)}` : "";
  const said = `Query ${state.step}, ${quoted(state.step)}, attends to ` +
    `${first || "no key in particular"}${others}.`;
  byId("said").textContent = said;
  clearTimeout(speech);
  speech = setTimeout(() => { byId("live").textContent = said; }, 500);
}

function keptText(i, s, step) {
  const left = leftOf(i, state.layer, state.head)[s];
  if (s > step) return "not read yet";
  if (left > step) {
    return left < numTokens ? `kept, leaves at ${left}` : "kept to the end";
  }
  return left === step ? "leaves now" : `left at ${left}`;
}

function markText(s) {
  return current.marks[s] & 1 ? "sink" : current.marks[s] & 2
    ? "heavy hitter" : "";
}

function drawTable(row, keys) {
  const cells = (tag, texts) => {
    const line = document.createElement("tr");
    line.append(...texts.map(text => {
      const cell = document.createElement(tag);
      cell.textContent = text;
      if (tag === "th") cell.scope = "col";
      return cell;
    }));
    return line;
  };
  byId("table-head").replaceChildren(cells("th", ["key", "position",
    "attention", "mark", ...header.policies.map(policy => policy.label)]));
  byId("table-body").replaceChildren(...keys.map(s => cells("td", [
    quoted(s), s, weightText(row, s), markText(s),
    ...header.policies.map((_, i) => keptText(i, s, state.step))])));
}

function tokenText(row, s) {
  const lines = [`${quoted(s)}, position ${s}`];
  if (s <= state.step)
    lines.push(`${weightText(row, s)} of the attention of query ${state.step}`);
  if (markText(s)) lines.push(markText(s));
  lines.push(`${percent(WEIGHTS[current.received[s]])} of all attention of ` +
    `this head`);
  header.policies.forEach((policy, i) =>
    lines.push(`${policy.label}: ${keptText(i, s, state.step)}`));
  return lines.join("\n");
}

let selected = null, active = null;

function drawActive(row) {
  const { token, step } = state, { tokens, spans } = columns[0];
  if (selected !== null) spans[selected].removeAttribute("aria-selected");
  spans[step].setAttribute("aria-selected", "true");
  selected = step;
  tokens.setAttribute("aria-activedescendant", `token-${token ?? step}`);
  for (const column of columns) {
    if (active !== null) column.spans[active].removeAttribute("data-active");
    if (token !== null) column.spans[token].dataset.active = "";
  }
  active = token;
  const at = token ?? step;
  spans[at].setAttribute("aria-label",
    tokenText(row, at).replaceAll("\n", "; "));
}

const clip = (value, size) => Math.min(size - 1, Math.max(0, value));
const goTo = step => change({ step: clip(step, numTokens), token: null });

function play(isOn) {
  clearInterval(timer);
  timer = isOn ? setInterval(() => {
    if (state.step >= numTokens - 1) play(false);
    else goTo(state.step + 1);
  }, 150) : null;
  byId("play").setAttribute("aria-pressed", isOn);
  byId("play").textContent = isOn ? "❚❚" : "▶";
}

function makeControls() {
  for (const [name, size] of [["layer", header.num_layers],
                              ["head", header.num_heads]]) {
    for (let i = 0; i < size; i++) byId(name).add(new Option(i, i));
    byId(name).addEventListener("change",
      event => change({ [name]: Number(event.target.value) }));
  }
  byId("step").max = numTokens - 1;
  byId("step").addEventListener("input",
    event => goTo(Number(event.target.value)));
  byId("play").addEventListener("click", () => {
    if (timer === null && state.step === numTokens - 1) goTo(0);
    play(timer === null);
  });
  const themes = ["system", "light", "dark"];
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const at = themes.indexOf(root.dataset.theme ?? "system");
    const theme = themes[(at + 1) % 3];
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    byId("theme").textContent = `◐ ${theme}`;
    byId("theme").setAttribute("aria-label", theme === "system"
      ? "Colours: as the system has them" : `Colours: ${theme}`);
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
}

function repaint() {
  colours.clear();
  drawPictures();
  if (current) drawMaps(current, state.layer, state.head);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("select")) return;
  const { layer, head, step } = state;
  const acts = {
    ",": () => goTo(step - 1),
    ".": () => goTo(step + 1),
    "[": () => change({ head: clip(head - 1, header.num_heads) }),
    "]": () => change({ head: clip(head + 1, header.num_heads) }),
    "{": () => change({ layer: clip(layer - 1, header.num_layers) }),
    "}": () => change({ layer: clip(layer + 1, header.num_layers) }),
    "p": () => byId("play").click(),
  };
  if (!(event.key in acts)) return;
  event.preventDefault();
  acts[event.key]();
}

function onTokenKey(event) {
  const at = state.token ?? state.step;
  const goal = { ArrowRight: at + 1, ArrowLeft: at - 1,
                 ArrowDown: lineFrom(at, 1), ArrowUp: lineFrom(at, -1),
                 Home: 0, End: numTokens - 1 }[event.key];
  if (event.key === "Enter") goTo(at);
  else if (goal === undefined) return;
  else change({ token: clip(goal, numTokens) });
  event.preventDefault();
}

// The token above or below one, by where they stand.
function lineFrom(s, direction) {
  const { spans } = columns[0];
  const { offsetTop: top, offsetLeft: side } = spans[s];
  let best = s, far = Infinity, line = null;
  for (let i = s + direction; i >= 0 && i < numTokens; i += direction) {
    if (spans[i].offsetTop === top) continue;
    line = line ?? spans[i].offsetTop;
    if (spans[i].offsetTop !== line) break;
    const distance = Math.abs(spans[i].offsetLeft - side);
    if (distance < far) [best, far] = [i, distance];
  }
  return best;
}

function makeTip() {
  const tip = byId("tip"), area = byId("columns");
  area.addEventListener("pointermove", event => {
    const s = event.target.dataset?.s;
    tip.hidden = s === undefined || current === null;
    if (tip.hidden) return;
    tip.textContent = tokenText(readRow(current, state.step), Number(s));
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const y = event.clientY + 18 + tip.offsetHeight > innerHeight
      ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18;
    tip.style.left = `${x}px`;
    tip.style.top = `${y}px`;
  });
  area.addEventListener("pointerleave", () => { tip.hidden = true; });
}

function makeLegend() {
  const ticks = [2 ** (-254 / header.steps_per_octave), .001, .01, .1, 1];
  byId("ticks").append(...ticks.map(weight => {
    const tick = document.createElement("span");
    tick.textContent = percent(weight).replace(/\.0+ /, " ");
    tick.style.left = `${100 * levelOf(weight) / 255}%`;
    return tick;
  }));
  const stops = Array.from({ length: 17 }, (_, i) =>
    `rgba(var(--attend), ${inkOf(255 * i / 16).toFixed(3)})`);
  document.querySelector(".scale").style.background =
    `linear-gradient(to right, ${stops.join(", ")})`;
  const error = 100 * (2 ** (.5 / header.steps_per_octave) - 1);
  const least = WEIGHTS[header.least_level];
  byId("scale-said").textContent =
    `The scale is one of logarithms. Attention is kept as one byte: 255 levels,` +
    ` each number at most ${error.toFixed(2)} % of itself off.` +
    (header.least_level > 1 ? ` Weights below ${percent(least)} are left out,` +
      ` to keep the page small;` : "") +
    ` Of a query the ${Math.min(header.num_entries, numTokens)} largest weights` +
    ` are kept at most; the others share what is left evenly, for the eye.`;
  if (!header.policies.length)
    for (const one of document.querySelectorAll(".of-policies")) one.hidden = true;
}

// Where a link points, as page.html#layer=3&head=4&step=57.
function fromLink() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const sizes = { layer: header.num_layers, head: header.num_heads,
                  step: numTokens };
  for (const [name, size] of Object.entries(sizes)) {
    const value = Number.parseInt(wanted.get(name), 10);
    if (value >= 0 && value < size) state[name] = value;
  }
}

async function start() {
  fromLink();
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
  addEventListener("hashchange", () => { fromLink(); change({ ...state }); open(); });
  await readPolicies();
  await drawPictures();
  change({});
}

start();
