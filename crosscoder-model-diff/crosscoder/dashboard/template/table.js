// The table of latents, a page of it at a time.

const ROWS_ON_PAGE = 100;
// With few figures there is room for more tokens.
const roomy = data.columns.filter((column) => column.in_table).length < 8;
document.getElementById("latents").classList.toggle("roomy", roomy);
let shown = [];
let firstShown = 0;
let overviewDrawn = "";

/** Find the latents of the view again and draw them from the first. */
function refreshTable() {
  shown = latentsOfView();
  firstShown = 0;
  drawTable();
}

function drawTable() {
  const matched = document.getElementById("matched");
  matched.hidden = !columnOf.has("match");
  matched.setAttribute("aria-pressed", view.matched);
  drawHeads();
  document.getElementById("rows").replaceChildren(
    ...shown.slice(firstShown, firstShown + ROWS_ON_PAGE).map(tableRow),
  );
  const active = shown.length === nLatents ? "" : ` of ${nLatents.toLocaleString("en")}`;
  document.getElementById("count").textContent =
    shown.length ? `${shown.length.toLocaleString("en")}${active} latents` : "No latent is like that. Clear a filter, or search for something else.";
  const last = Math.min(shown.length, firstShown + ROWS_ON_PAGE);
  document.getElementById("page").textContent =
    `${(firstShown + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
  document.getElementById("pages").hidden = shown.length <= ROWS_ON_PAGE;
  document.getElementById("earlier").disabled = firstShown === 0;
  document.getElementById("later").disabled = last === shown.length;
  document.getElementById("filters-set").textContent = nFilters() ? `(${nFilters()} set)` : "";
  document.getElementById("sort").value = view.sort;
  document.getElementById("direction").textContent = view.descending ? "↓ falling" : "↑ rising";
  drawOverview();
}

// Of a latent's own figures, those that stand beside its partner's in another dictionary.
const BESIDE_PARTNER = ["label", "kind", "relative_decoder_norm", "frequency"];

/** What is sorted by is always shown. */
function tableColumns() {
  const wanted = ({ key, in_table, matched }) => view.matched ? matched || BESIDE_PARTNER.includes(key) : in_table;
  const found = data.columns.filter((column) => wanted(column) || column.key === view.sort);
  return [...found.filter((column) => !column.matched), ...found.filter((column) => column.matched)];
}

/** Where latents have labels, or partners are shown, those stand in place of the tokens that latents promote. */
function tokenColumns() {
  const promoted = !view.matched && !columnOf.has("label");
  return [...TEXT_COLUMNS.keys()].filter((key) => promoted || key === "topTokens" || key === view.sort);
}

function tokensOf(key, latent) {
  return key === "topTokens" ? data.topTokens[latent] : data.promoted[Number(key.slice("promoted".length))][latent];
}

function drawHeads() {
  const heads = [["latent", "latent", "The latent's number."], ...tableColumns().map((c) => [c.key, c.label, c.help]),
    ...tokenColumns().map((key) => [key, TEXT_COLUMNS.get(key), ""])];
  document.getElementById("heads").replaceChildren(...heads.map(([key, label, help]) => {
    const sorted = view.sort === key;
    const button = make("button", { type: "button", title: help, "data-sort": key }, label,
      make("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (view.descending ? "↓" : "↑") : ""));
    const order = sorted ? (view.descending ? "descending" : "ascending") : null;
    return make("th", { scope: "col", class: cellClass(key), "aria-sort": order }, button);
  }));
}

/** `major` columns stay on a phone, and so does the one that is sorted by. */
function cellClass(key) {
  const kind = columnOf.get(key)?.kind ?? (key === "latent" ? "count" : "tokens");
  const always = ["latent", columnOf.has("label") ? "label" : "kind", "topTokens", "match", "match_cosine"];
  const major = always.includes(key) || key === view.sort;
  return `${["word", "text", "tokens"].includes(kind) ? kind : "figure"}${major ? " major" : ""}`;
}

function tableRow(latent) {
  const cells = tableColumns().map((column) => make("td", { class: cellClass(column.key) }, tableCell(column, latent)));
  return make("tr", { "data-latent": latent },
    make("th", { scope: "row", class: cellClass("latent") }, latentLink(latent)),
    ...cells,
    ...tokenColumns().map((key) => make("td", { class: cellClass(key) }, chips(tokensOf(key, latent).slice(0, roomy ? 8 : 5)))));
}

function tableCell(column, latent) {
  if (column.key === "kind") return kindTag(latent);
  const value = valueOf(column.key, latent);
  const text = format(value, column.kind);
  if (column.key !== "relative_decoder_norm" || value === null) return text;
  return make("span", { class: "with-lean" }, lean(value), text);
}

/** Where a relative decoder norm lies between the instruct (left) and the fine-tuned model (right). */
function lean(value) {
  const mark = make("span", { class: "lean-mark" });
  mark.style.left = `${100 * value}%`;
  return make("span", { class: "lean", "aria-hidden": "true" }, mark);
}

/** How the column that is sorted by is distributed: of all active latents, and of those in the table. By distance from
 * one half the relative norm itself is drawn, which shows the two sides. */
function drawOverview() {
  const figure = document.getElementById("overview");
  const column = columnOf.get(view.sort === "norm_distance" ? "relative_decoder_norm" : view.sort);
  figure.hidden = !column || ["word", "text"].includes(column.kind);
  const state = `${viewToHash()} ${shown.length}`;
  if (figure.hidden || state === overviewDrawn) return;
  overviewDrawn = state;
  const values = data.values[column.key];
  const [low, high] = extents.get(column.key);
  const active = [...values.keys()].filter(isActive);
  const [from, to] = column.key === "relative_decoder_norm" ? [0, 1] : drawnRange(active.map((latent) => values[latent]));
  const counts = (latents) => binned(latents.map((latent) => values[latent]), from, to, 50);
  const all = counts(active);
  const here = counts(shown);
  const outside = active.filter((latent) => values[latent] !== null && (values[latent] < from || values[latent] > to)).length;
  figure.replaceChildren(
    histogram({
      layers: [{ counts: all, name: "all" }, { counts: here, name: "here" }], from, to, height: 120, label: column.kind === "share" ? `${column.label}, as a fraction` : column.label,
      describe: `Histogram of ${column.label}: ${threeDigits(low)} to ${threeDigits(high)}, ${shown.length} latents in the table`,
    }),
    make("figcaption", {}, make("strong", {}, column.label), ` ${column.help} `,
      outside ? `${outside.toLocaleString("en")} of the active latents lie outside of what is drawn. ` : null,
      make("span", { class: "keys-line" }, make("span", { class: "key here" }, "in the table"), make("span", { class: "key all" }, "all active latents"))),
  );
}

/** From the lowest to the highest value; without the outermost hundredth at either end where it would squeeze the rest. */
function drawnRange(values) {
  const rising = values.filter((value) => value !== null).sort((a, b) => a - b);
  if (!rising.length) return [0, 1];
  const at = (share) => rising[Math.round(share * (rising.length - 1))];
  const [low, high, inner] = [at(0), at(1), at(0.99) - at(0.01)];
  if (inner <= 0 || high - low <= 3 * inner) return [low, high];
  return [Math.max(low, at(0.01) - inner / 10), Math.min(high, at(0.99) + inner / 10)];
}

/** The latents of the table, all pages of it, as CSV: every figure as it is stored, and text. */
function tableAsCsv() {
  const quoted = (value) => /[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  const lines = [["latent", ...data.columns.map(({ key }) => key), ...[...TEXT_COLUMNS.values()].map((name) => name.replaceAll(" ", "_")), "example"]];
  for (const latent of shown) {
    const [before, token = "", after = ""] = strongestFiring(latent);
    lines.push([latent, ...data.columns.map(({ key }) => valueOf(key, latent) ?? ""),
      ...[...TEXT_COLUMNS.keys()].map((key) => tokensOf(key, latent).map((token) => JSON.stringify(word(token))).join(" ")),
      token && `${before}«${token}»${after}`]);
  }
  return `${lines.map((line) => line.map((value) => quoted(String(value))).join(",")).join("\n")}\n`;
}

function saveTable() {
  const address = URL.createObjectURL(new Blob([tableAsCsv()], { type: "text/csv" }));
  make("a", { href: address, download: `${data.title.replace(/[^\w.-]+/g, "_")}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

function sortBy(key) {
  const words = TEXT_COLUMNS.has(key) || ["word", "text"].includes(columnOf.get(key)?.kind) || key === "latent";
  view.descending = view.sort === key ? !view.descending : !words;
  view.sort = key;
}

function turnPage(pages) {
  const first = firstShown + pages * ROWS_ON_PAGE;
  if (first < 0 || first >= shown.length) return false;
  firstShown = first;
  drawTable();
  return true;
}

function rowLinks() {
  return [...document.querySelectorAll("#rows th a")];
}

/** Move the focus by one row, over the ends of the page. */
function moveRow(step) {
  const links = rowLinks();
  const at = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
  if (at < 0) return focusLink(links[step > 0 ? 0 : links.length - 1]);
  if (links[at + step]) return focusLink(links[at + step]);
  if (turnPage(step)) focusLink(rowLinks().at(step > 0 ? 0 : -1));
}

function focusLink(link) {
  link?.focus({ preventScroll: true });
  link?.closest("tr").scrollIntoView({ block: "nearest" });
}

/** Put the focus on a latent's row, on whichever page it is. */
function focusLatent(latent) {
  const at = shown.indexOf(latent);
  if (at < 0) return;
  firstShown = at - (at % ROWS_ON_PAGE);
  drawTable();
  focusLink(rowLinks()[at - firstShown]);
}
