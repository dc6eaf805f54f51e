// The page of one latent.

function drawLatent(latent) {
  const page = document.getElementById("latent");
  const examples = readExamples(latent);
  page.replaceChildren(
    latentHead(latent),
    make("div", { class: "panels" },
      panel("Statistics", statistics(latent)),
      panel("Activations", activations(latent)),
      promoted(latent),
      panel("Tokens it fires on most", examples ? firesOn(examples.firesOn) : chips(data.topTokens[latent])),
      panel("Nearest latents", ...nearest(latent))),
    ...(examples ? exampleSections(latent, examples) : [withoutExamples(latent)]),
  );
  return page;
}

function panel(heading, ...content) {
  return make("section", { class: "panel" }, make("h3", {}, heading), ...content);
}

function latentHead(latent) {
  const at = shown.indexOf(latent);
  const place = at < 0 ? "not in the table as it is filtered" : `${(at + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")} in the table`;
  const neighbour = (step, text) => {
    const other = at < 0 ? undefined : shown[at + step];
    return other === undefined ? make("span", { class: "off" }, text) : latentLink(other, text);
  };
  const part = columnOf.has("part") ? make("span", { class: "tag" }, `${valueOf("part", latent)} latent of the partition`) : null;
  const confirmed = columnOf.has("confirmed") && valueOf("confirmed", latent);
  return make("header", { class: "latent-head" },
    make("nav", { "aria-label": "Latents" }, make("a", { href: viewToHash(), id: "back" }, "← Table"),
      neighbour(-1, "Previous"), neighbour(1, "Next"), make("span", { class: "off" }, place)),
    make("h2", { id: "latent-heading", tabindex: "-1" }, `Latent ${latent} `, part, kindTag(latent),
      confirmed ? make("span", { class: "tag" }, `confirmed as ${confirmed}`) : null));
}

function statistics(latent) {
  const rows = data.columns.filter((column) => column.key !== "kind").map((column) => make("div", {},
    make("dt", { title: column.help }, column.label),
    make("dd", {}, tableCell(column, latent))));
  return make("dl", { class: "statistics" }, ...rows);
}

function activations(latent) {
  const counts = data.histograms[latent];
  if (!counts) return make("p", {}, "Active on no token.");
  const n = counts.reduce((sum, count) => sum + count, 0);
  const to = data.largest[latent];
  return make("figure", {},
    histogram({
      layers: [{ counts, name: "here" }], from: 0, to, label: "activation", height: 190,
      describe: `Histogram of ${n} activations, 0 to ${threeDigits(to)}`,
    }),
    make("figcaption", {}, `${n.toLocaleString("en")} tokens on which it is active; counts on a logarithmic axis.`));
}

/** Tokens that one direction alone promotes stand out from those that the other promotes too. */
function promoted(latent) {
  const several = data.directions.length > 1;
  const lists = data.directions.flatMap((direction, i) => {
    const others = new Set(data.promoted.filter((_, k) => k !== i).flatMap((lists) => lists[latent]));
    const items = data.promoted[i][latent].map((token) => make("li", { class: several && !others.has(token) ? "alone" : "" },
      make("span", { class: "chip" }, quoted(word(token)))));
    const heading = several ? `by the ${direction} vector` : `by the ${direction}`;
    return [make("h4", {}, heading), make("ol", { class: "promoted" }, ...items)];
  });
  const note = `${several ? "Blue: by this model's vector alone. " : ""}Read by the output layer as if no layer came ` +
    "between: after a middle layer mostly noise.";
  return panel("Tokens it promotes", ...lists, make("p", { class: "note" }, note));
}

function firesOn(uses) {
  const head = ["token", "firings", "of its occurrences", "mean activation"].map((text) => make("th", { scope: "col" }, text));
  const rows = uses.map((use) => make("tr", {}, make("th", { scope: "row" }, make("span", { class: "chip" }, quoted(use.text))),
    make("td", {}, format(use.firings, "count")), make("td", {}, format(use.share, "share")), make("td", {}, threeDigits(use.mean))));
  return make("table", { class: "small" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function nearest(latent) {
  const pairs = data.nearest[latent];
  const rows = [];
  for (let i = 0; i < pairs.length; i += 2) {
    rows.push(make("tr", {}, make("th", { scope: "row" }, latentLink(pairs[i])), make("td", {}, threeDigits(pairs[i + 1])),
      columnOf.has("kind") ? make("td", {}, kindTag(pairs[i])) : null,
      make("td", { class: "tokens" }, chips(data.topTokens[pairs[i]].slice(0, 3)))));
  }
  const head = ["latent", "cosine", ...(columnOf.has("kind") ? ["class"] : []), "fires on"].map((text) => make("th", { scope: "col" }, text));
  const table = make("table", { class: "small nearest" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  const vectors = data.directions.length > 1 ? "decoder vectors, both models' as one" : "decoder vectors";
  return [table, make("p", { class: "note" }, `By the cosine of the ${vectors}.`)];
}

function exampleSections(latent, { strongest, bands }) {
  const largest = data.largest[latent];
  const figures = (examples) => make("div", { class: "pair" }, ...examples.map((example, i) => exampleFigure(example, largest, i)));
  const ordinal = ["Lowest quarter", "Second quarter", "Third quarter", "Highest quarter"];
  return [
    make("section", { class: "examples" }, make("h3", {}, "Maximally activating examples"), lineBreaks(), figures(strongest),
      strongest.length === 1 ? make("p", { class: "note" }, "All of its firings are on one page, so there is one context.") : null),
    make("section", { class: "examples" }, make("h3", {}, "Examples by quantile of activation"),
      ...bands.flatMap(({ from, lowest, highest, examples }) => [
        make("h4", {}, `${ordinal[Math.round(4 * from)]} `, make("span", { class: "note" },
          `${threeDigits(lowest)} to ${threeDigits(highest)}, drawn at random`)),
        figures(examples),
      ])),
  ];
}

function exampleFigure(example, largest, i) {
  const { level } = example.tokens[example.peak];
  const name = `Example ${i + 1}, left and right arrow keys read each token's activation`;
  return make("figure", { class: "example" }, passage(example, largest, name),
    make("figcaption", {}, make("strong", {}, threeDigits(largest * level / data.levels)), ...breakable(example.document)));
}

function lineBreaks() {
  const box = make("input", { type: "checkbox", onchange: () => document.body.classList.toggle("flowing", !box.checked) });
  box.checked = !document.body.classList.contains("flowing");
  return make("label", { class: "check line-breaks" }, box, "line breaks");
}

function withoutExamples(latent) {
  const context = data.contexts[latent];
  if (!context) return make("p", {}, "It is active on no token, so there is no example.");
  return make("section", { class: "examples" }, make("h3", {}, "Its strongest firing"),
    make("p", { class: "passage" }, visible(context)),
    make("p", { class: "note" }, "One context: this file has examples for the most interesting latents alone, and this one is not among them."));
}
