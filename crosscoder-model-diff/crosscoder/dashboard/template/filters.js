// Which latents the table holds, and in which order. All of it stands in the address, so a view can be sent on.

const MISSING_LAST = 1;
const MOSTLY = 0.5;
// dead: never active ones too; examples: with examples alone; content: none that is mostly active on the template.
const NO_FLAGS = { dead: false, examples: false, content: false };
const TEXT_COLUMNS = new Map([
  ["topTokens", "fires on"],
  ...data.directions.map((name, i) => [`promoted${i}`, `${name} promotes`]).reverse(),
]);
const wordColumns = data.columns.filter((column) => column.kind === "word");
const numberColumns = data.columns.filter((column) => !["word", "text"].includes(column.kind));
const extents = new Map(numberColumns.map((column) => [column.key, extentOf(data.values[column.key])]));

function defaultView() {
  const sort = ["norm_distance", "difference_share", "frequency"].find((key) => columnOf.has(key));
  return { query: "", sort, descending: true, matched: false, words: new Map(), ranges: new Map(), ...NO_FLAGS };
}

let view = defaultView();

function extentOf(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** The latents of the view, in its order. */
function latentsOfView() {
  const query = view.query.trim().toLowerCase();
  const number = /^\d+$/.test(query) ? Number(query) : null;
  const found = [];
  for (let latent = 0; latent < nLatents; latent += 1) {
    if (passes(latent) && (!query || latent === number || searchText(latent).includes(query))) found.push(latent);
  }
  const order = comparison();
  found.sort((a, b) => (b === number) - (a === number) || order(a, b) || a - b);
  return found;
}

function passes(latent) {
  if (!view.dead && !isActive(latent)) return false;
  if (view.examples && !data.examples[latent]) return false;
  if (view.content && valueOf("template_share", latent) > MOSTLY) return false;
  for (const [key, allowed] of view.words) {
    if (!allowed.has(valueOf(key, latent))) return false;
  }
  for (const [key, [low, high]] of view.ranges) {
    const value = valueOf(key, latent);
    if (value === null || (low !== null && value < low) || (high !== null && value > high)) return false;
  }
  return true;
}

function comparison() {
  const sign = view.descending ? -1 : 1;
  if (view.sort === "latent") return (a, b) => sign * (a - b);
  const values = sortValues();
  return (a, b) => {
    const [x, y] = [values(a), values(b)];
    const [noX, noY] = [x === null || x === "", y === null || y === ""];
    if (noX || noY) return MISSING_LAST * (noX - noY);
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  };
}

function sortValues() {
  if (!TEXT_COLUMNS.has(view.sort)) return (latent) => data.values[view.sort][latent];
  return (latent) => tokensOf(view.sort, latent).map(word).join("").trim().toLowerCase();
}

function sortLabel(key) {
  return key === "latent" ? "number" : TEXT_COLUMNS.get(key) ?? columnOf.get(key).label;
}

function nFilters() {
  return view.words.size + view.ranges.size + Object.keys(NO_FLAGS).filter((flag) => view[flag]).length;
}

// The view as the part of the address after #, and back.

function viewToHash(latent = null) {
  const usual = defaultView();
  const parts = new URLSearchParams(latent === null ? {} : { latent });
  if (view.query) parts.set("q", view.query);
  if (view.sort !== usual.sort || view.descending !== usual.descending) {
    parts.set("sort", `${view.descending ? "-" : ""}${view.sort}`);
  }
  for (const [key, allowed] of view.words) parts.set(key, [...allowed].join(","));
  for (const [key, [low, high]] of view.ranges) parts.set(key, `${low ?? ""}..${high ?? ""}`);
  for (const flag of ["matched", ...Object.keys(NO_FLAGS)]) if (view[flag]) parts.set(flag, "1");
  return `#${parts}`;
}

function viewFromHash(parts) {
  const read = defaultView();
  read.query = parts.get("q") ?? "";
  const sort = (parts.get("sort") ?? "").match(/^(-?)(\w+)$/);
  if (sort && (sort[2] === "latent" || TEXT_COLUMNS.has(sort[2]) || columnOf.has(sort[2]))) {
    [read.sort, read.descending] = [sort[2], sort[1] === "-"];
  }
  for (const { key } of wordColumns) {
    if (parts.has(key)) read.words.set(key, new Set(parts.get(key).split(",")));
  }
  for (const { key } of numberColumns) {
    const ends = (parts.get(key) ?? "").split("..").map((end) => (end === "" ? null : Number(end)));
    if (parts.has(key) && ends.length === 2 && !ends.some(Number.isNaN)) read.ranges.set(key, ends);
  }
  for (const flag of ["matched", ...Object.keys(NO_FLAGS)]) read[flag] = parts.get(flag) === "1";
  read.matched &&= columnOf.has("match");
  read.content &&= columnOf.has("template_share");
  return read;
}

// The form.

function buildFilters(changed) {
  const fields = document.getElementById("filter-fields");
  fields.replaceChildren(
    ...wordColumns.map((column) => wordField(column, changed)),
    flagField("dead", "Never active", "show latents that are never active", changed),
    ...(data.examples.every((examples, latent) => examples || !isActive(latent)) ? [] : [flagField("examples", "Examples", "only latents with examples", changed)]),
    ...(columnOf.has("template_share") ? [flagField("content", "Template", "leave out latents mostly on template tokens", changed)] : []),
    ...numberColumns.map((column) => rangeField(column, changed)),
  );
}

function wordField(column, changed) {
  const there = [...new Set(data.values[column.key])].filter((value) => value !== null).sort();
  const boxes = there.map((value) => {
    const chosen = view.words.get(column.key);
    const box = make("input", { type: "checkbox", value, name: column.key });
    box.checked = !chosen || chosen.has(value);
    return make("label", { class: "check" }, box, value || "none");
  });
  const field = make("fieldset", { class: "words" }, make("legend", { title: column.help }, column.label), ...boxes);
  field.addEventListener("change", () => {
    const checked = [...field.querySelectorAll(":checked")].map((box) => box.value);
    if (checked.length === there.length) view.words.delete(column.key);
    else view.words.set(column.key, new Set(checked));
    changed();
  });
  return field;
}

function flagField(name, legend, text, changed) {
  const box = make("input", { type: "checkbox", name, onchange: () => { view[name] = box.checked; changed(); } });
  box.checked = view[name];
  return make("fieldset", {}, make("legend", {}, legend), make("label", { class: "check" }, box, text));
}

function rangeField(column, changed) {
  const chosen = view.ranges.get(column.key) ?? [null, null];
  const inputs = ["from", "to"].map((end, i) => {
    const attributes = {
      type: "number", step: "any", name: `${column.key}-${end}`, inputmode: "decimal", "aria-label": `${column.label} ${end}`,
      placeholder: String(Number(extents.get(column.key)[i].toPrecision(3))), value: chosen[i],
    };
    return make("input", attributes);
  });
  // The table shows per cent.
  const label = column.kind === "share" ? `${column.label}, as a fraction` : column.label;
  const field = make("fieldset", {}, make("legend", { title: column.help }, label),
    make("span", { class: "range" }, inputs[0], "to", inputs[1]));
  field.addEventListener("input", () => {
    const ends = inputs.map((input) => (input.value === "" ? null : Number(input.value)));
    if (ends.every((end) => end === null)) view.ranges.delete(column.key);
    else view.ranges.set(column.key, ends);
    changed();
  });
  return field;
}
