// Maps of the chosen head: queries run down, keys to the right.

// Cells of a side, and pixels of one: small maps have room for a fine hatch.
const GRID = Math.min(numTokens, 400);
const CELL = Math.max(1, Math.floor(400 / GRID));
const figures = [];

function makeMaps(onChoose) {
  const names = ["Attention, with all keys",
                 ...header.policies.map(policy => policy.label)];
  for (const name of names) {
    const figure = document.createElement("figure");
    figure.innerHTML = `<figcaption><b></b><small></small></figcaption>
      <div class="map" role="img"><canvas
      width="${GRID * CELL}" height="${GRID * CELL}">
      </canvas><i class="row"></i><i class="column"></i></div>
      <div class="axes" aria-hidden="true"><span>key 0</span>
      <span>↓ query, → key</span><span>${numTokens - 1}</span></div>`;
    figure.querySelector("b").textContent = name;
    const map = figure.querySelector(".map");
    const place = event => {
      const box = map.getBoundingClientRect();
      const at = (x, size) =>
        Math.min(numTokens - 1, Math.max(0, Math.floor(numTokens * x / size)));
      onChoose(at(event.clientY - box.top, box.height),
               at(event.clientX - box.left, box.width));
    };
    map.addEventListener("pointerdown", event => {
      map.setPointerCapture(event.pointerId);
      place(event);
    });
    map.addEventListener("pointermove", event => {
      if (event.buttons) place(event);
    });
    document.getElementById("maps").append(figure);
    figures.push({
      said: figure.querySelector("small"), map,
      context: figure.querySelector("canvas").getContext("2d"),
      row: figure.querySelector(".row"),
      column: figure.querySelector(".column"),
    });
  }
}

const colours = new Map();

function colour(name) {
  if (!colours.has(name)) {
    const style = getComputedStyle(document.documentElement);
    colours.set(name, style.getPropertyValue(name).split(",").map(Number));
  }
  return colours.get(name);
}

// The largest level of each part of the map: [kept, gone]; `left` is when
// tokens leave, or null where none does.
function parts(found, left) {
  const kept = new Uint8Array(GRID * GRID);
  const gone = new Uint8Array(GRID * GRID);
  const cell = Uint32Array.from({ length: numTokens },
    (_, t) => Math.floor(t * GRID / numTokens));
  for (let t = 0; t < numTokens; t++) {
    const row = cell[t] * GRID;
    const first = found.starts[t], last = found.starts[t + 1];
    for (let i = first; i < last; i++) {
      const s = found.keys[i];
      const part = left && left[s] <= t ? gone : kept;
      const at = row + cell[s];
      if (part[at] < found.levels[i]) part[at] = found.levels[i];
    }
    const others = t + 1 - (last - first);
    const even = others ? levelOf(WEIGHTS[found.rests[t]] / others) : 0;
    if (even)
      for (let c = 0; c <= cell[t]; c++)
        if (kept[row + c] < even) kept[row + c] = even;
  }
  return [kept, gone];
}

// How dark a level is: faint ones fainter, so that large weights stand out.
const inkOf = level => (level / 255) ** 1.8;

// Bytes of a pixel as one number, as machines with low bytes first have it.
const pixel = ([red, green, blue], alpha) =>
  (alpha << 24 | blue << 16 | green << 8 | red) >>> 0;

function drawMaps(found, layer, head) {
  const shades = name => Uint32Array.from({ length: 256 },
    (_, level) => pixel(colour(name), Math.round(255 * inkOf(level))));
  const attend = shades("--attend"), lost = shades("--lost");
  // A hatch, so that colour is not the only sign.
  const hatch = [26, 90].map(alpha => pixel(colour("--hatch"), alpha));
  const middle = Uint32Array.from({ length: GRID },
    (_, i) => Math.floor((i + .5) * numTokens / GRID));
  figures.forEach(({ context }, i) => {
    const left = i ? leftOf(i - 1, layer, head) : null;
    const [kept, gone] = parts(found, left);
    const size = GRID * CELL;
    const image = context.createImageData(size, size);
    const pixels = new Uint32Array(image.data.buffer);
    for (let y = 0; y < size; y++) {
      const row = Math.floor(y / CELL);
      for (let x = 0; x < (row + 1) * CELL; x++) {
        const column = Math.floor(x / CELL), at = row * GRID + column;
        let shade = attend[kept[at]];
        if (left !== null && left[middle[column]] <= middle[row])
          shade = gone[at] > 90 ? lost[gone[at]] : hatch[(x + y) % 5 ? 0 : 1];
        pixels[y * size + x] = shade;
      }
    }
    context.putImageData(image, 0, 0);
  });
}

function drawCross(step, token) {
  const at = t => `${100 * (t + .5) / numTokens}%`;
  for (const { row, column } of figures) {
    row.style.top = at(step);
    column.style.left = at(token ?? step);
    column.hidden = token === null;
  }
}
