// The record that the page holds, unpacked by open.js, and how it is read. encoding.py says how it is laid out.

const data = JSON.parse(document.getElementById("data").textContent);
const nLatents = data.largest.length;
const columnOf = new Map(data.columns.map((column) => [column.key, column]));
const hasFrequency = columnOf.has("frequency");
const textColumns = data.columns.filter((column) => column.kind === "text");

function valueOf(key, latent) {
  return data.values[key][latent];
}

function isActive(latent) {
  return !hasFrequency || valueOf("frequency", latent) > 0;
}

function word(token) {
  return data.vocabulary[token];
}

/** An example as {document, peak, tokens: [{text, level}]}. */
function readExample([document, stretch, first, n, peak, ...fired]) {
  const tokens = data.stretches[stretch].slice(first, first + n).map((token) => ({ text: word(token), level: 0 }));
  for (let i = 0; i < fired.length; i += 2) tokens[fired[i]].level = fired[i + 1];
  return { document: data.documents[document], peak, tokens };
}

/** {strongest, bands, firesOn} of a latent; null where it has no examples. */
function readExamples(latent) {
  const stored = data.examples[latent];
  if (!stored) return null;
  const [strongest, bands, uses] = stored;
  return {
    strongest: strongest.map(readExample),
    bands: bands.map(([from, to, lowest, highest, examples]) =>
      ({ from, to, lowest, highest, examples: examples.map(readExample) })),
    firesOn: uses.map(([token, firings, share, mean]) => ({ text: word(token), firings, share, mean })),
  };
}

// What is searched: all text of a latent, in lower case. Put together when the first search asks for it.
const searchTexts = new Array(nLatents);

function searchText(latent) {
  searchTexts[latent] ??= gatherText(latent).toLowerCase();
  return searchTexts[latent];
}

function gatherText(latent) {
  const lists = [data.topTokens[latent], ...data.promoted.map((lists) => lists[latent])];
  const texts = lists.flatMap((tokens) => tokens.map(word));
  texts.push(data.contexts[latent], ...textColumns.map(({ key }) => valueOf(key, latent) ?? ""));
  const stored = data.examples[latent];
  if (stored) {
    const [strongest, bands, uses] = stored;
    for (const [, stretch, first, n] of [...strongest, ...bands.flatMap((band) => band[4])]) {
      texts.push(data.stretches[stretch].slice(first, first + n).map(word).join(""));
    }
    texts.push(...uses.map(([token]) => word(token)));
  }
  return texts.join("\n");
}

/** A figure as text, by its column's kind. */
function format(value, kind) {
  if (value === null || value === undefined || value === "") return "–";
  if (kind === "word" || kind === "text") return value;
  if (kind === "count") return value.toLocaleString("en");
  if (kind === "share") return value > 0 && value < 1e-5 ? "<0.001%" : `${percent(100 * value)}%`;
  return threeDigits(value);
}

/** Two digits below one per cent, so that 0.97% is not taken for 97%. */
function percent(value) {
  return value > 0 && value < 1 ? `${Number(value.toPrecision(2))}` : threeDigits(value);
}

function threeDigits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 100 ? Math.round(value).toLocaleString("en")
    : size < 0.001 ? value.toExponential(1)
    : size < 0.1 ? value.toPrecision(2)
    : size < 1 ? value.toFixed(3)
    : value.toPrecision(3);
  return text.replace("-", "−");
}

/** A token's text with what cannot be seen made visible; spaces and line breaks stay what they are. */
function visible(text) {
  return text
    .replaceAll("\n", "↵\n")
    .replaceAll("\t", "⇥\t")
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
}

/** The same for a list of tokens, where leading and trailing spaces count too. */
function quoted(text) {
  return visible(text).replaceAll("↵\n", "↵").replaceAll("⇥\t", "⇥").replaceAll(" ", "␣") || "∅";
}

/** An element. Children are elements or text; text is only ever text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function chips(tokens) {
  return make("span", { class: "chips" }, ...tokens.map((token) => make("span", { class: "chip" }, quoted(word(token)))));
}

/** A name that may break after a slash or an underscore. */
function breakable(text) {
  return text.split(/(?<=[/_])/).flatMap((part) => [part, make("wbr")]);
}

/** A link to a latent, which keeps the view of the table to come back to. */
function latentLink(latent, text = String(latent)) {
  return make("a", { href: viewToHash(latent) }, text);
}

/** A latent's strongest firing as [text before, the token, text after]. */
function strongestFiring(latent) {
  const stored = data.examples[latent];
  if (!stored) return data.contexts[latent].split(/[«»]/, 3);
  const { tokens, peak } = readExample(stored[0][0]);
  const texts = tokens.map(({ text }) => text);
  return [texts.slice(0, peak).join(""), texts[peak], texts.slice(peak + 1).join("")];
}

/** The class of a latent, as a word in its colour; nothing where there are no classes. */
function kindTag(latent) {
  if (!columnOf.has("kind")) return null;
  const kind = valueOf("kind", latent);
  return make("span", { class: `tag kind-${kind}` }, kind);
}
