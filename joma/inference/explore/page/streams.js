// The page's numbers: opens a stream when a head is looked at.

const header = JSON.parse(document.getElementById("header").textContent);
const numTokens = header.num_tokens;

// What levels stand for, as joma.inference.explore.levels has it.
const WEIGHTS = Float64Array.from({ length: 256 }, (_, level) =>
  level ? 2 ** ((level - 255) / header.steps_per_octave) : 0);

function levelOf(weight) {
  if (!(weight > 0)) return 0;
  const level = 255 + header.steps_per_octave * Math.log2(weight);
  return Math.min(255, Math.max(0, Math.round(level)));
}

async function inflate(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream()
    .pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Whole numbers of two bytes: all low ones, then all high ones.
function whole(bytes) {
  const size = bytes.length / 2;
  return Uint16Array.from({ length: size },
    (_, i) => bytes[i] + 256 * bytes[size + i]);
}

// Of the keys of query t: keys[starts[t]] to keys[starts[t + 1] - 1].
function parseHead(bytes) {
  let place = 0;
  const take = size => bytes.subarray(place, place += size);
  const counts = whole(take(2 * numTokens));
  const starts = new Uint32Array(numTokens + 1);
  counts.forEach((count, t) => { starts[t + 1] = starts[t] + count; });
  const [rests, received, marks] = [0, 0, 0].map(() => take(numTokens));
  const shares = header.policies.map(() => take(numTokens));
  const keys = whole(take(2 * starts[numTokens]));
  for (let t = 0; t < numTokens; t++)
    for (let i = starts[t] + 1; i < starts[t + 1]; i++) keys[i] += keys[i - 1];
  return { starts, keys, levels: take(starts[numTokens]), rests, received,
           marks, shares };
}

const heads = new Map();

async function readHead(layer, head) {
  const index = layer * header.num_heads + head;
  if (!heads.has(index)) {
    if (heads.size > 15) heads.delete(heads.keys().next().value);
    heads.set(index, inflate(`head-${index}`).then(parseHead));
  }
  return heads.get(index);
}

// Of each policy, when a layer's KV head lets go of each token.
const leftAt = [];

async function readPolicies() {
  for (const i of header.policies.keys())
    leftAt.push(whole(await inflate(`left-${i}`)));
}

function leftOf(policy, layer, head) {
  const numHeads = header.policies[policy].num_kv_heads;
  const group = header.num_heads / numHeads;
  const row = layer * numHeads + Math.floor(head / group);
  return leftAt[policy].subarray(row * numTokens, (row + 1) * numTokens);
}

// A query's attention as levels [T]. `bound`: a key that is not stored has
// less; such keys share `rest`, the weight that is left, evenly, for the eye.
function readRow(found, t) {
  const levels = new Uint8Array(numTokens);
  const isStored = new Uint8Array(numTokens);
  let least = 255;
  for (let i = found.starts[t]; i < found.starts[t + 1]; i++) {
    levels[found.keys[i]] = found.levels[i];
    isStored[found.keys[i]] = 1;
    least = Math.min(least, found.levels[i]);
  }
  const count = found.starts[t + 1] - found.starts[t];
  const isFull = count === header.num_entries && count < t + 1;
  const bound = WEIGHTS[isFull ? least : Math.max(header.least_level, 1)];
  const rest = WEIGHTS[found.rests[t]];
  const others = t + 1 - count;
  const even = others ? Math.min(levelOf(rest / others), levelOf(bound)) : 0;
  for (let s = 0; s <= t; s++) if (!isStored[s]) levels[s] = even;
  return { levels, isStored, bound, rest, others };
}

function percent(weight) {
  const value = 100 * weight;
  if (value >= 9.995) return value.toFixed(1) + " %";
  if (value >= .995) return value.toFixed(2) + " %";
  return value.toPrecision(3) + " %";
}

// A key's weight as text: "12.3 %", or "below 0.02 %" where none is stored.
function weightText(row, s) {
  if (row.isStored[s]) return percent(WEIGHTS[row.levels[s]]);
  return `below ${percent(row.bound)}`;
}
