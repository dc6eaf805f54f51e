// Histograms, as SVG.

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A round number near a third of `range`, to place ticks. */
function tickStep(range) {
  const power = 10 ** Math.floor(Math.log10(range / 4));
  return [1, 2, 5, 10].map((m) => m * power).find((step) => range / step <= 5);
}

/**
 * Layers of counts over the same bins, drawn over each other on a logarithmic axis of counts.
 * layers: [{counts, name}]; from, to: the ends of the axis; label: of the axis; describe: text for screen readers.
 */
function histogram({ layers, from, to, label, describe, height = 150 }) {
  const [width, left, right, top, bottom] = [560, 44, 8, 10, 34];
  const largest = Math.max(1, ...layers.flatMap((layer) => layer.counts));
  const scale = (count) => (height - top - bottom) * Math.log1p(count) / Math.log1p(largest);
  const x = (value) => left + (width - left - right) * (value - from) / (to - from || 1);
  const base = height - bottom;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": describe, class: "chart" });
  for (let count = 1; count <= largest; count *= 10) {
    const y = base - scale(count);
    svg.append(draw("line", { x1: left, x2: width - right, y1: y, y2: y, class: "grid" }));
    svg.append(draw("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, count.toLocaleString("en")));
  }
  for (const { counts, name } of layers) {
    const bin = (width - left - right) / counts.length;
    counts.forEach((count, i) => {
      if (!count) return;
      const bar = { x: left + i * bin + 0.5, y: base - scale(count), width: Math.max(1, bin - 1), height: scale(count) };
      const [low, high] = [i, i + 1].map((n) => threeDigits(from + (to - from) * n / counts.length));
      const title = `${low} to ${high}: ${count.toLocaleString("en")}`;
      svg.append(draw("rect", { ...bar, rx: 1, class: name }, draw("title", {}, title)));
    });
  }
  svg.append(draw("line", { x1: left, x2: width - right, y1: base, y2: base, class: "axis" }));
  const step = tickStep(to - from || 1);
  for (let n = Math.ceil(from / step); n * step <= to + step / 1000; n += 1) {
    const place = { x: x(n * step), y: base + 14, "text-anchor": "middle" };
    svg.append(draw("text", place, String(Number((n * step).toPrecision(6)))));
  }
  svg.append(draw("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle", class: "label" }, label));
  return svg;
}

/** Counts of values in n equal bins; what is null, or outside, is left out. */
function binned(values, from, to, n) {
  const counts = new Array(n).fill(0);
  for (const value of values) {
    if (typeof value === "number" && value >= from && value <= to) counts[Math.min(n - 1, Math.floor(n * (value - from) / (to - from || 1)))] += 1;
  }
  return counts;
}
