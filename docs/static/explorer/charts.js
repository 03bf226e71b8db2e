// The three charts of the block explorer, as SVG: the weights, the levels over the density, the error. Each draws into an <svg> what it
// is given, as wide as that is on the page, so that the letters keep their size on a phone.
"use strict";

const Charts = (() => {
  const MARGIN = { left: 52, right: 8, top: 26, bottom: 44 };
  const SMOOTH = 0.06; // standard deviation of the density's smoothing, in scales
  const BOTH = (top) => [-top, -top / 2, 0, top / 2, top];

  const widths = new WeakMap(); // of each <svg>: asking the browser while the page is being rewritten would lay it out each time

  /** Note how wide a chart is. Returns whether that is news. */
  function measure(svg) {
    const before = widths.get(svg);
    widths.set(svg, Math.max(240, svg.clientWidth));
    return before !== widths.get(svg);
  }

  function place(element, attributes) {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  }

  function make(name, attributes, text = "") {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    element.textContent = text;
    return place(element, attributes);
  }

  const line = (kind, x1, y1, x2, y2) => make("line", { class: kind, x1, y1, x2, y2 });
  const short = (value) => String(Number(value.toPrecision(3)));

  /** The end of an axis, a tenth above all magnitudes or more: 2, 3, 4, 6, 8, ..., whose steps float32 holds exactly. */
  function range(values) {
    const wanted = 1.1 * values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    if (!wanted) return 1;
    const power = 2 ** Math.ceil(Math.log2(wanted));
    return wanted <= 0.75 * power ? 0.75 * power : power;
  }

  /** An empty chart with its axes. x, y: {low, high, ticks, label}. Returns where values lie in pixels, and a layer for them. */
  function frame(svg, height, x, y) {
    const width = widths.get(svg);
    place(svg, { viewBox: `0 0 ${width} ${height}`, height });
    const [right, bottom] = [width - MARGIN.right, height - MARGIN.bottom];
    const atX = (value) => MARGIN.left + ((value - x.low) / (x.high - x.low)) * (right - MARGIN.left);
    const atY = (value) => bottom - ((value - y.low) / (y.high - y.low)) * (bottom - MARGIN.top);
    const layer = make("g", { class: "drawn" });
    svg.querySelector(":scope > .drawn")?.remove();
    svg.prepend(layer);
    for (const tick of y.ticks) {
      layer.append(line(tick === 0 ? "zero" : "grid", MARGIN.left, atY(tick), right, atY(tick)));
      layer.append(make("text", { x: MARGIN.left - 6, y: atY(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of x.ticks) {
      layer.append(make("text", { x: atX(tick), y: bottom + 22, "text-anchor": "middle" }, short(tick)));
    }
    layer.append(make("text", { x: (MARGIN.left + right) / 2, y: height - 5, "text-anchor": "middle" }, x.label));
    layer.append(make("text", { x: 2, y: 12 }, y.label));
    return { atX, atY, layer, bottom, width };
  }

  /** The axis of the weights that are shown, `first` to `last` (not with it), numbered from 1. */
  function places(svg, first, last) {
    const step = widths.get(svg) < 600 ? 16 : 8;
    const ticks = [];
    for (let place = first + 1; place <= last; place++) if (place === first + 1 || place % step === 0) ticks.push(place);
    return { low: first + 0.5, high: last + 0.5, ticks, label: "number of the weight" };
  }

  /** A bar of the editor: a slider as high as the chart, whose coloured part is the weight and whose dash is the decoded weight. */
  function slider() {
    const bar = make("g", { role: "slider", "aria-orientation": "vertical" });
    bar.append(make("rect", { class: "column" }), make("rect", { class: "weight" }), line("decoded", 0, 0, 0, 0));
    return bar;
  }

  /** The bars of the weights. They stay the same elements from one drawing to the next, so that the focus stays where it is. */
  function editor(svg, { first, last, weights, decoded, selected, top, described }) {
    const area = frame(svg, 260, places(svg, first, last), { low: -top, high: top, ticks: BOTH(top), label: "weight" });
    const bars = svg.querySelector(":scope > .bars") ?? svg.appendChild(make("g", { class: "bars" }));
    while (bars.children.length > last - first) bars.lastChild.remove();
    while (bars.children.length < last - first) bars.append(slider());
    const step = area.atX(1) - area.atX(0);
    [...bars.children].forEach((bar, i) => {
      const [index, value] = [first + i, weights[first + i]];
      const [column, rect, dash] = bar.children;
      const left = area.atX(index + 0.5);
      place(column, { x: left, y: MARGIN.top, width: step, height: area.bottom - MARGIN.top });
      const [high, low] = [area.atY(Math.max(value, 0)), area.atY(Math.min(value, 0))];
      place(rect, { x: left + step * 0.15, y: high, width: step * 0.7, height: Math.max(low - high, 1) });
      place(dash, { x1: left, x2: left + step, y1: area.atY(decoded[index]), y2: area.atY(decoded[index]) });
      place(bar, { tabindex: index === selected ? 0 : -1, "aria-label": `Weight ${index + 1}`, "aria-valuemin": -top });
      place(bar, { "aria-valuemax": top, "aria-valuenow": value, "aria-valuetext": described(index) });
      bar.toggleAttribute("aria-current", index === selected);
    });
    return area;
  }

  /** The density of `values` at `at`: each value smoothed with a normal distribution. */
  function densityAt(values, at) {
    let total = 0;
    for (const value of values) {
      const far = (at - value) / SMOOTH;
      if (far > -5 && far < 5) total += Math.exp((-far * far) / 2);
    }
    return total / (values.length * SMOOTH * Math.sqrt(2 * Math.PI));
  }

  /** Codes by level from left to right, those of levels that lie on one another together: [{left, right, text: "8,0"}, ...]. */
  function levelLabels(levels, atX) {
    const order = levels.map((level, code) => [atX(level), code.toString(16)]).sort((a, b) => a[0] - b[0]);
    const labels = [];
    for (const [pixel, code] of order) {
      const before = labels.at(-1);
      if (before && pixel - before.right < 5) Object.assign(before, { right: pixel, text: `${before.text},${code}` });
      else labels.push({ left: pixel, right: pixel, text: code });
    }
    return labels;
  }

  /** Levels over the density of `values`, which are weights divided by their scale. chosen: [the value, its level]. */
  function density(svg, { levels, values, chosen }) {
    const end = Math.max(1.1, 1.05 * values.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
    const grid = Array.from({ length: 201 }, (_, i) => -end + (2 * end * i) / 200);
    const heights = grid.map((at) => densityAt(values, at));
    const high = Math.ceil(2 * Math.max(...heights)) / 2;
    const x = { low: -end, high: end, ticks: [-1, -0.5, 0, 0.5, 1], label: "weight / scale of the block" };
    const area = frame(svg, 240, x, { low: 0, high, ticks: [0, high / 2, high], label: "density" });
    const points = grid.map((at, i) => `${area.atX(at).toFixed(1)},${area.atY(heights[i]).toFixed(1)}`);
    const corners = [`${area.atX(-end)},${area.bottom}`, ...points, `${area.atX(end)},${area.bottom}`];
    area.layer.append(make("polygon", { class: "area", points: corners.join(" ") }));
    for (const level of levels) {
      const kind = level === chosen[1] ? "chosen-level" : "level";
      area.layer.append(line(kind, area.atX(level), MARGIN.top, area.atX(level), area.bottom));
    }
    for (const { left, right, text } of levelLabels(levels, area.atX)) {
      area.layer.append(make("text", { x: (left + right) / 2, y: MARGIN.top - 4, "text-anchor": "middle", class: "code" }, text));
    }
    for (const value of [...values, chosen[0]]) {
      const kind = value === chosen[0] ? "chosen-rug" : "rug";
      area.layer.append(line(kind, area.atX(value), area.bottom + 1, area.atX(value), area.bottom + 9));
    }
  }

  /** The error of each weight that is shown. */
  function error(svg, { first, last, errors, selected }) {
    const shown = errors.slice(first, last);
    const top = range(shown);
    const area = frame(svg, 240, places(svg, first, last), { low: -top, high: top, ticks: BOTH(top), label: "error" });
    const step = area.atX(1) - area.atX(0);
    shown.forEach((value, i) => {
      const [high, low] = [area.atY(Math.max(value, 0)), area.atY(Math.min(value, 0))];
      const x = area.atX(first + i + 0.5) + step * 0.15;
      area.layer.append(make("rect", { class: "weight", x, y: high, width: step * 0.7, height: low - high }));
    });
    const at = area.atX(selected + 1);
    area.layer.append(line("end", at, MARGIN.top, at, area.bottom));
  }

  return { measure, editor, density, error, range, edges: MARGIN };
})();
