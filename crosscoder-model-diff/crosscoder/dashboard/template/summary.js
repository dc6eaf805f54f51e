// The first screen: what fine-tuning changed, in sentences, and the latents that changed most.

function showSummary() {
  const { sentences, changed } = data.summary;
  document.getElementById("summary").hidden = !changed.length;
  document.getElementById("sentences").replaceChildren(...sentences.map((text) => make("li", {}, text)));
  document.getElementById("changed").replaceChildren(...changed.map((latent) => make("tr", {},
    make("th", { scope: "row" }, latentLink(latent)), ...changedCells(latent))));
  const heads = ["latent", ...changedColumns().map(([head]) => head)].map((head) => make("th", { scope: "col" }, head));
  document.getElementById("changed-heads").replaceChildren(...heads);
  document.getElementById("changed-note").textContent = "Examples are from the texts that both models were given to read, "
    + "not from replies of theirs." + (columnOf.has("family") ? " A family of questions is new where "
    + "fine-tuning was the first to ask for it, known where the base model was trained on it." : "");
}

/** [head, class of its cells, latent => content] of the columns; what was not measured has none. */
function changedColumns() {
  const figure = (key) => [columnOf.get(key).label, `figure ${key}`, (latent) => tableCell(columnOf.get(key), latent)];
  const family = ["most active on questions of", "family", (latent) => valueOf("family", latent) === null ? "–"
    : `${valueOf("family", latent)}, ${threeDigits(valueOf("family_times", latent))} times its mean over all questions`];
  const fires = ["fires on", "tokens", (latent) => chips(data.topTokens[latent].slice(0, 4))];
  const label = ["label", "text", (latent) => valueOf("label", latent) ?? chips(data.topTokens[latent].slice(0, 4))];
  return [
    columnOf.has("label") ? label : fires,
    ...[data.summary.by, "causal_effect", "completion_share"].filter((key) => columnOf.has(key)).map(figure),
    ...(columnOf.has("family") ? [family] : []),
    ["strongest example", "firing", firing],
  ];
}

function changedCells(latent) {
  return changedColumns().map(([, name, content]) => make("td", { class: name }, content(latent)));
}

/** The strongest firing on one line, from shortly before it. */
function firing(latent) {
  const [before, token = "", after = ""] = strongestFiring(latent);
  const line = (text) => visible(text).replace(/[↵⇥]?\s+/g, " ");
  return make("span", {}, `…${line(before).slice(-40)}`, make("mark", {}, quoted(token)), line(after));
}
