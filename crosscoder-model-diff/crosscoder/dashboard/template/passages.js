// Examples: every token shaded by the latent's activation, its value shown by pointer, touch or keyboard.

// Per cent of the colour for the smallest activation, which must be seen too; from there to 100 it rises evenly.
const FAINTEST = 12;
const tip = document.getElementById("tip");

function passage(example, largest, name) {
  const spans = example.tokens.map(({ text, level }, i) => {
    const span = make("span", { class: i === example.peak ? "token peak" : "token", "data-level": level }, visible(text));
    if (level) span.style.setProperty("--share", `${(FAINTEST + (100 - FAINTEST) * level / data.levels).toFixed(1)}%`);
    return span;
  });
  const text = make("p", { class: "passage", tabindex: "0", role: "group", "aria-label": name, "data-largest": largest }, ...spans);
  text.addEventListener("keydown", (event) => readByKeyboard(event, spans, example.peak));
  text.addEventListener("blur", hideTip);
  return text;
}

function readByKeyboard(event, spans, peak) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const at = spans.findIndex((span) => span.classList.contains("read"));
  showTip(spans[at < 0 ? peak : Math.min(spans.length - 1, Math.max(0, at + step))]);
}

function showTip(span) {
  hideTip();
  span.classList.add("read");
  const level = Number(span.dataset.level);
  const value = Number(span.parentElement.dataset.largest) * level / data.levels;
  tip.replaceChildren(make("span", { class: "chip" }, quoted(span.textContent.replaceAll("↵\n", "\n").replaceAll("⇥\t", "\t"))),
    make("strong", {}, threeDigits(value)), level ? `${Math.round(100 * level / data.levels)}% of the largest` : "not active");
  tip.hidden = false;
  placeTip(span);
}

function placeTip(span) {
  const [box, own] = [span.getClientRects()[0] ?? span.getBoundingClientRect(), tip.getBoundingClientRect()];
  const left = Math.min(document.documentElement.clientWidth - own.width - 8, Math.max(8, box.left + box.width / 2 - own.width / 2));
  tip.style.left = `${left}px`;
  tip.style.top = `${box.top > own.height + 12 ? box.top - own.height - 6 : box.bottom + 6}px`;
}

/** Whether there was one to hide. */
function hideTip() {
  const was = !tip.hidden;
  tip.hidden = true;
  document.querySelectorAll(".token.read").forEach((span) => span.classList.remove("read"));
  return was;
}

document.addEventListener("pointerover", (event) => {
  const span = event.target.closest?.(".token");
  if (span) showTip(span);
});
document.addEventListener("pointerout", (event) => {
  // A finger that lifts leaves too; what it touched stays shown until the next touch.
  if (event.pointerType !== "touch" && event.target.closest?.(".token")) hideTip();
});
document.addEventListener("click", (event) => {
  const span = event.target.closest?.(".token");
  if (span) showTip(span);
  else hideTip();
});
document.addEventListener("scroll", () => {
  const span = document.querySelector(".token.read");
  if (span) placeTip(span);
}, { passive: true });
