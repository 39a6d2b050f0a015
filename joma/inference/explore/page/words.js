// What the page says of a query, in words and in its table.

function stepText(step) {
  const kind = step < header.num_prompt ? "text" : "the model's";
  const decoded = step - header.first_step + 1;
  return `${step} of ${numTokens - 1}, ${quoted(step)} (${kind}` +
    (decoded > 0 && header.policies.length ? `, decode step ${decoded})` : ")");
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
      `keeps ${mean.toFixed(1)} % of this head's attention, mean over decode steps`;
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
      `below ${percent(row.bound).replace(/\.?0+ /, " ")}` : "";
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
