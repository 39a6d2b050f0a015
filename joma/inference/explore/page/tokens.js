// The text as tokens: once with all keys, and once for each policy.

const LATER = 1, GONE = 2, LEAVES = 4, QUERY = 8, SINK = 16, HEAVY = 32;
const CLASSES = [[LATER, "later"], [GONE, "gone"], [LEAVES, "leaves"],
                 [QUERY, "query"], [SINK, "sink"], [HEAVY, "heavy"]];
const columns = [];

function pieceText(s) {
  const piece = header.pieces[s];
  return piece === "" ? "·" : piece.replaceAll("\n", "⏎\n");
}

// For lists and sentences: spaces are seen, line ends take no line.
function quoted(s) {
  const piece = header.pieces[s];
  if (piece === "") return `token ${s} (no text of its own)`;
  return `“${piece.replaceAll("\n", "⏎")}”`;
}

function classesOf(state) {
  return ["t", ...CLASSES.filter(([bit]) => state & bit).map(([, n]) => n)]
    .join(" ");
}

function makeColumns(onChoose) {
  const names = ["With all keys", ...header.policies.map(
    policy => `${policy.label}, ${policy.slots} slots`)];
  const parent = document.getElementById("columns");
  names.forEach((name, i) => {
    const box = document.createElement("div");
    box.className = "column-of";
    box.innerHTML = '<h3></h3><p></p><div class="tokens"></div>';
    box.querySelector("h3").textContent = name;
    const tokens = box.querySelector(".tokens");
    // One column speaks for all: its tokens tell what every policy keeps.
    tokens.setAttribute("role", i ? "img" : "listbox");
    if (!i) {
      tokens.tabIndex = 0;
      tokens.setAttribute("aria-label", "The text, token by token");
    }
    const spans = header.pieces.map((_, s) => {
      const span = document.createElement("span");
      span.className = "t";
      span.textContent = pieceText(s);
      span.dataset.s = s;
      if (!i) {
        span.setAttribute("role", "option");
        span.id = `token-${s}`;
      }
      return span;
    });
    tokens.append(...spans);
    tokens.addEventListener("click", event => {
      const s = event.target.dataset.s;
      if (s !== undefined) onChoose(Number(s));
    });
    parent.append(box);
    columns.push({ tokens, spans, said: box.querySelector("p"),
                   seen: new Int32Array(numTokens).fill(-1),
                   codes: new Int32Array(numTokens), tops: null, scroll: 0 });
  });
  for (const column of columns) {
    // Columns are of one width, so that the same tokens stand side by side.
    column.tokens.addEventListener("scroll", () => {
      const top = column.tokens.scrollTop;
      if (top === column.scroll) return;
      for (const each of columns) {
        each.scroll = top;
        if (each !== column) each.tokens.scrollTop = top;
        paint(each);
      }
    }, { passive: true });
  }
  new ResizeObserver(() => {
    columns.forEach(measure);
    columns.forEach(paint);
  }).observe(parent);
}

// Where tokens stand does not depend on how they are marked.
function measure(column) {
  column.tops = Int32Array.from(column.spans, span => span.offsetTop);
  column.height = column.tokens.clientHeight;
  column.scroll = column.tokens.scrollTop;
}

// States and levels of a column's tokens.
function drawColumn(column, step, row, marks, left) {
  for (let s = 0; s < numTokens; s++) {
    let state = (marks[s] & 1 ? SINK : 0) | (marks[s] & 2 ? HEAVY : 0);
    if (s > step) state |= LATER;
    if (s === step) state |= QUERY;
    if (left && left[s] <= step) state |= GONE;
    if (left && left[s] === step) state |= LEAVES;
    column.codes[s] = state << 8 | row.levels[s];
  }
  paint(column);
}

// Of the tokens in sight those that have changed.
function paint(column) {
  const { spans, seen, codes, tops, scroll, height } = column;
  const stop = firstAt(tops, scroll + height + 40);
  for (let s = firstAt(tops, scroll - 40); s < stop; s++) {
    if (codes[s] === seen[s]) continue;
    if (codes[s] >> 8 !== seen[s] >> 8)
      spans[s].className = classesOf(codes[s] >> 8);
    if ((codes[s] & 255) !== (seen[s] & 255) || seen[s] < 0)
      spans[s].style.setProperty("--a", inkOf(codes[s] & 255).toFixed(3));
    seen[s] = codes[s];
  }
}

// The first token that stands at `top` or below it.
function firstAt(tops, top) {
  let low = 0, high = numTokens;
  while (low < high) {
    const middle = low + high >> 1;
    if (tops[middle] < top) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Scrolls a column, and nothing around it, so that a token is seen.
function reveal(column, s) {
  const { tops, scroll, height, tokens } = column;
  if (tops[s] >= scroll + 20 && tops[s] <= scroll + height - 50) return;
  column.scroll = Math.max(
    0, Math.min(tops[s] - height / 2, tops[numTokens - 1] + 40 - height));
  tokens.scrollTop = column.scroll = Math.round(column.scroll);
}
