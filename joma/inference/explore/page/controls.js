// What keys, clicks and the pointer do.

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
    tick.textContent = percent(weight).replace(/\.?0+ /, " ");
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
      ` to keep the page small.` : "") +
    ` Of a query the ${Math.min(header.num_entries, numTokens)} largest weights` +
    ` are kept at most; the others share what is left evenly, for the eye.`;
  byId("hatch-said").textContent = header.policies.length
    ? "Hatched: tokens that are gone; orange: attention to them, which is lost."
    : "";
  if (!header.policies.length)
    for (const one of document.querySelectorAll(".of-policies")) one.hidden = true;
}
