// Which view the address names, the keyboard, and the colour scheme.

const list = document.getElementById("list");
const search = document.getElementById("search");
let lastLatent = null;
let listScroll = 0;

function latentOfHash() {
  const text = new URLSearchParams(location.hash.slice(1)).get("latent") ?? "";
  return /^\d+$/.test(text) && Number(text) < nLatents ? Number(text) : null;
}

function route() {
  hideTip();
  const latent = latentOfHash();
  const parts = new URLSearchParams(location.hash.slice(1));
  const asked = parts.get("latent");
  parts.delete("latent");
  if (`#${parts}` !== viewToHash()) {
    view = viewFromHash(parts);
    fillForm();
    refreshTable();
  }
  const nowhere = document.getElementById("nowhere");
  nowhere.hidden = latent !== null || asked === null;
  nowhere.textContent = `There is no latent “${asked}”: they are numbered from 0 to ${nLatents - 1}.`;
  if (latent === null) openTable();
  else openLatent(latent);
}

function openLatent(latent) {
  if (!list.hidden) listScroll = scrollY;
  const page = drawLatent(latent);
  list.hidden = true;
  document.body.classList.add("reading");
  page.hidden = false;
  lastLatent = latent;
  document.title = `Latent ${latent} – ${data.title}`;
  scrollTo(0, 0);
  document.getElementById("latent-heading").focus({ preventScroll: true });
}

function openTable() {
  const wasHidden = list.hidden;
  document.getElementById("latent").hidden = true;
  list.hidden = false;
  document.body.classList.remove("reading");
  document.title = data.title;
  if (!wasHidden) return;
  scrollTo(0, listScroll);
  if (lastLatent !== null) focusLatent(lastLatent);
}

function fillForm() {
  search.value = view.query;
  buildFilters(viewChanged);
}

/** After any change of the view by the reader. */
function viewChanged() {
  try { history.replaceState(null, "", viewToHash()); } catch { /* some browsers allow so many changes in a minute */ }
  refreshTable();
}

function setUpForm() {
  const options = ["latent", ...data.columns.map((column) => column.key), ...TEXT_COLUMNS.keys()];
  document.getElementById("sort").replaceChildren(...options.map((key) => make("option", { value: key }, sortLabel(key))));
  document.getElementById("sort").addEventListener("change", (event) => { view.sort = event.target.value; viewChanged(); });
  document.getElementById("direction").addEventListener("click", () => { view.descending = !view.descending; viewChanged(); });
  document.getElementById("heads").addEventListener("click", (event) => {
    const key = event.target.closest("[data-sort]")?.dataset.sort;
    if (!key) return;
    sortBy(key);
    viewChanged();
    document.querySelector(`[data-sort="${key}"]`).focus();
  });
  document.getElementById("matched").addEventListener("click", () => {
    view.matched = !view.matched;
    Object.assign(view, { sort: view.matched ? "match_cosine" : defaultView().sort, descending: true });
    viewChanged();
  });
  document.getElementById("save").addEventListener("click", saveTable);
  search.addEventListener("input", () => { view.query = search.value; viewChanged(); });
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("clear").addEventListener("click", () => {
    Object.assign(view, { words: new Map(), ranges: new Map(), ...NO_FLAGS });
    fillForm();
    viewChanged();
  });
  for (const [id, step] of [["earlier", -1], ["later", 1]]) {
    document.getElementById(id).addEventListener("click", () => {
      turnPage(step);
      document.getElementById("count").scrollIntoView();
    });
  }
  document.getElementById("rows").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && !event.target.closest("a") && !String(getSelection())) location.hash = viewToHash(row.dataset.latent);
  });
}

// Keyboard

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented) return;
  const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
  const action = list.hidden ? latentKey(event.key) : tableKey(event.key, typing, event.target === search);
  if (!action) return;
  event.preventDefault();
  action();
}

function tableKey(key, typing, searching) {
  if (searching && key === "Enter") return () => { if (shown.length) location.hash = viewToHash(shown[0]); };
  if (searching && key === "ArrowDown") return () => moveRow(1);
  if (typing && key === "Escape") return () => document.activeElement.blur();
  if (typing) return null;
  return {
    "/": () => search.focus(),
    j: () => moveRow(1), ArrowDown: () => moveRow(1),
    k: () => moveRow(-1), ArrowUp: () => moveRow(-1),
  }[key];
}

function latentKey(key) {
  const at = shown.indexOf(lastLatent);
  const go = (step) => () => { if (at >= 0 && shown[at + step] !== undefined) location.hash = viewToHash(shown[at + step]); };
  return {
    j: go(1), k: go(-1),
    Escape: () => { if (!hideTip()) location.hash = viewToHash(); },
    "/": () => { location.hash = viewToHash(); setTimeout(() => search.focus()); },
  }[key];
}

// Colours: as the system has them, light or dark

const SCHEMES = ["auto", "light", "dark"];

function setScheme(scheme) {
  if (scheme === "auto") delete document.documentElement.dataset.scheme;
  else document.documentElement.dataset.scheme = scheme;
  const button = document.getElementById("theme");
  button.textContent = `Colours: ${scheme}`;
  button.onclick = () => {
    const next = SCHEMES[(SCHEMES.indexOf(scheme) + 1) % SCHEMES.length];
    try { localStorage.setItem("scheme", next); } catch { /* a browser may forbid a local file to store things */ }
    setScheme(next);
  };
}

function storedScheme() {
  try {
    const stored = localStorage.getItem("scheme");
    return SCHEMES.includes(stored) ? stored : "auto";
  } catch {
    return "auto";
  }
}

function showFacts() {
  document.getElementById("home").replaceChildren(...breakable(data.title));
  document.getElementById("facts").replaceChildren(
    ...data.facts.map(([label, text]) => make("div", {}, make("dt", {}, label), make("dd", {}, text))));
  document.getElementById("meanings").replaceChildren(
    ...data.columns.map(({ label, help }) => make("div", {}, make("dt", {}, label), make("dd", {}, help))));
  const n = data.examples.filter(Boolean).length;
  const active = [...Array(nLatents).keys()].filter(isActive).length;
  const which = n < active ? ` They are those ${data.chosenBy}; the others have statistics and one context.` : "";
  document.getElementById("notes").textContent =
    `${n.toLocaleString("en")} of ${active.toLocaleString("en")} active latents have examples.${which} ` +
    `Activations in examples are stored in 8 bits: true to 1/${data.levels} of the latent's largest.`;
}

setScheme(storedScheme());
showFacts();
showSummary();
setUpForm();
view = viewFromHash(new URLSearchParams(location.hash.slice(1)));
fillForm();
refreshTable();
addEventListener("hashchange", route);
document.addEventListener("keydown", onKey);
route();
// Who is sent a view of the table is to see the table.
if (!list.hidden && viewToHash() !== "#") document.getElementById("list-heading").scrollIntoView();
document.documentElement.dataset.ready = "";
