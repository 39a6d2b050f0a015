// Small pictures of all heads, in an order of the reader's choice.

const numHeads = header.num_layers * header.num_heads;
const ORDERS = [
  { name: "layer and head", said: "Layers run down, heads to the right." },
  { name: "entropy, sharpest first", values: header.heads.entropy, up: true,
    unit: "entropy", said: "The first attend to few keys." },
  { name: "entropy, widest first", values: header.heads.entropy,
    unit: "entropy", said: "The first attend to many keys." },
  { name: "sink mass", values: header.heads.sink, unit: "sink mass",
    said: "The first give most to the first token." },
  { name: "prefix matching (induction)", values: header.heads.induction,
    unit: "prefix matching",
    said: "The first look behind an earlier occurrence of the same token." },
  ...header.policies.map(policy => ({
    name: `attention that ${policy.label} loses`, unit: "lost",
    values: policy.shares.map(share => 1 - share),
    said: "The first lose most, mean over decode steps.",
  })),
];
const buttons = [];
let shown = [];

function headName(index) {
  return `layer ${Math.floor(index / header.num_heads)}, head ` +
    `${index % header.num_heads}`;
}

function headText(index) {
  const { entropy, sink, induction } = header.heads;
  return `${headName(index)}: entropy ${entropy[index].toFixed(2)} nats, ` +
    `sink mass ${sink[index].toFixed(2)}, prefix matching ` +
    `${induction[index].toFixed(2)}`;
}

// All pictures in one, which each button shows a part of.
function spriteOf(levels) {
  const width = header.width, across = Math.ceil(Math.sqrt(numHeads));
  const canvas = document.createElement("canvas");
  canvas.width = across * width;
  canvas.height = Math.ceil(numHeads / across) * width;
  const context = canvas.getContext("2d");
  const shades = Uint32Array.from({ length: 256 },
    (_, level) => pixel(colour("--attend"), Math.round(255 * inkOf(level))));
  for (let i = 0; i < numHeads; i++) {
    const image = context.createImageData(width, width);
    const part = levels.subarray(i * width * width, (i + 1) * width * width);
    new Uint32Array(image.data.buffer).set(
      Uint32Array.from(part, level => shades[level]));
    context.putImageData(image, (i % across) * width,
                         Math.floor(i / across) * width);
  }
  return { url: canvas.toDataURL(), across,
           down: canvas.height / width };
}

let pictures = null;

async function drawPictures() {
  pictures = pictures ?? await inflate("pictures");
  const { url, across, down } = spriteOf(pictures);
  buttons.forEach((button, i) => {
    const style = button.firstChild.style;
    const part = (k, n) => `${n > 1 ? 100 * k / (n - 1) : 0}%`;
    style.backgroundImage = `url(${url})`;
    style.backgroundSize = `${100 * across}% ${100 * down}%`;
    style.backgroundPosition = `${part(i % across, across)} ` +
      part(Math.floor(i / across), down);
  });
}

function makeHeads(onChoose) {
  const group = document.getElementById("heads");
  for (let i = 0; i < numHeads; i++) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("role", "radio");
    button.setAttribute("aria-label", headText(i));
    button.title = headText(i);
    button.dataset.index = i;
    button.innerHTML = '<span class="picture"></span><span class="name"></span>';
    button.addEventListener("click", () => onChoose(i));
    buttons.push(button);
  }
  group.addEventListener("keydown", event => {
    const at = shown.indexOf(Number(document.activeElement.dataset.index));
    const across = rowLength();
    const move = { ArrowRight: 1, ArrowLeft: -1,
                   ArrowDown: across, ArrowUp: -across }[event.key];
    if (move === undefined || at < 0) return;
    event.preventDefault();
    const index = shown[Math.min(shown.length - 1, Math.max(0, at + move))];
    onChoose(index);
    buttons[index].focus();
  });
  const order = document.getElementById("order");
  ORDERS.forEach(({ name }, i) => order.add(new Option(name, i)));
  order.addEventListener("change", () => orderHeads(Number(order.value)));
  orderHeads(0);
}

function rowLength() {
  const top = buttons[shown[0]].offsetTop;
  const next = shown.findIndex(i => buttons[i].offsetTop > top);
  return next < 0 ? shown.length : next;
}

function orderHeads(which) {
  const { values, up, said, unit } = ORDERS[which];
  shown = buttons.map((_, i) => i);
  if (values)
    shown.sort((a, b) => (up ? 1 : -1) * (values[a] - values[b]) || a - b);
  const group = document.getElementById("heads");
  group.classList.toggle("by-layer", !values);
  group.style.gridTemplateColumns = `repeat(${header.num_heads}, 38px)`;
  for (const i of shown) {
    const name = `${Math.floor(i / header.num_heads)}·${i % header.num_heads}`;
    buttons[i].lastChild.textContent = values ? values[i].toFixed(2) : name;
    buttons[i].title = values ? `${headText(i)}; ${unit} ${values[i].toFixed(3)}`
      : headText(i);
  }
  group.replaceChildren(...shown.map(i => buttons[i]));
  document.getElementById("order-said").textContent =
    values ? `${said} Below each picture: ${unit}.`
           : `${said} Below each picture: layer·head.`;
}

let marked = null;

function markHead(index) {
  if (index === marked) return;
  for (const i of marked === null ? buttons.keys() : [marked, index]) {
    buttons[i].setAttribute("aria-checked", i === index);
    buttons[i].tabIndex = i === index ? 0 : -1;
  }
  marked = index;
  const group = document.getElementById("heads"), button = buttons[index];
  const top = button.offsetTop - group.offsetTop;
  if (top < group.scrollTop || top > group.scrollTop + group.clientHeight - 50)
    group.scrollTop = top - group.clientHeight / 2;
}
