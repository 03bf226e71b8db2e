// The page of the block explorer: it reads the controls, lets Arithmetic quantize, and shows the result. Numbers go in and out exactly.
"use strict";

(() => {
  const at = (id) => document.getElementById(id);
  const PIECE = 64; // weights that are shown at a time
  const LARGEST = 3e38; // a little below the largest float32
  const state = { weights: new Float32Array(1), selected: 0, drawn: "normal", result: null, shown: -1, top: 1 };

  // ---- words and numbers

  /** A float32 number in the fewest digits that give the same bits when they are read again. */
  function exact(value) {
    if (Object.is(value, -0)) return "-0";
    for (let digits = 1; digits <= 9; digits++) {
      const text = String(Number(value.toPrecision(digits)));
      if (Math.fround(Number(text)) === value) return text;
    }
    return String(value);
  }

  const brief = (value) => String(Number(value.toPrecision(4)));
  const hex = (byte) => byte.toString(16).padStart(2, "0");
  const bits = (code, width) => code.toString(2).padStart(width, "0");

  // ---- what the controls say

  const book = () => TABLES.formats[at("format").value];
  const config = () => ({
    blocksize: Number(at("blocksize").value),
    scale: at("scale").value,
    signedScale: at("signed-scale").checked,
    doubleQuant: at("double-quant").checked,
  });

  /** Block, first and last weight (not with it) of the piece of at most 64 weights in which a weight lies. */
  function pieceOf(index) {
    const size = config().blocksize;
    const block = Math.floor(index / size);
    const first = block * size + Math.floor((index % size) / PIECE) * PIECE;
    return { block, first, last: Math.min(first + PIECE, (block + 1) * size, state.weights.length) };
  }

  function refuse(message) {
    at("refused").textContent = message;
  }

  // ---- changes: each computes anew where it must, and shows

  /** Draw weights as the form says. */
  function draw() {
    const [count, seed] = [Number(at("count").value), Number(at("seed").value)];
    if (!Number.isInteger(count) || count < 1 || count > 4096) return refuse("How many: wanted a whole number from 1 to 4096.");
    if (!Number.isInteger(seed) || seed < 0) return refuse("Seed: wanted a whole number that is not negative.");
    if (at("kind").value !== "own") state.drawn = at("kind").value;
    at("kind").value = state.drawn;
    take(Draws.weights(state.drawn, count, seed));
  }

  /** Take what is pasted. Nothing changes where one word is not a number. */
  function paste(event) {
    event.preventDefault();
    const words = at("pasted").value.split(/[\s,;]+/).filter(Boolean);
    const wrong = words.findIndex((word) => !Number.isFinite(Math.fround(Number(word))));
    if (!words.length || words.length > 4096) return refuse(`${words.length} numbers; wanted 1 to 4096.`);
    if (wrong >= 0) return refuse(`Number ${wrong + 1}, "${words[wrong]}", is not a finite float32 number.`);
    at("kind").value = "own";
    at("count").value = words.length;
    take(Float32Array.from(words, Number));
  }

  function take(weights) {
    refuse("");
    state.weights = weights;
    state.selected = Math.min(state.selected, weights.length - 1);
    state.shown = -1;
    compute();
    show();
  }

  /** Give the selected weight a value; while a bar is dragged the axis stays as it is. */
  function change(value, dragging = false) {
    state.weights[state.selected] = Math.min(LARGEST, Math.max(-LARGEST, value));
    at("kind").value = "own";
    compute();
    show(dragging);
  }

  function select(index, focus = false) {
    state.selected = Math.min(Math.max(index, 0), state.weights.length - 1);
    show();
    if (focus) at("editor").querySelector("[tabindex='0']").focus();
  }

  // ---- the editor's bars

  function onKey(event) {
    const { first, last } = pieceOf(state.selected);
    const [value, step] = [state.weights[state.selected], state.top / 128];
    const moves = { ArrowLeft: state.selected - 1, ArrowRight: state.selected + 1, Home: first, End: last - 1 };
    const changes = { ArrowUp: value + step, ArrowDown: value - step, PageUp: value + 8 * step, PageDown: value - 8 * step, 0: 0 };
    if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in moves || event.key in changes)) return;
    event.preventDefault();
    if (event.key in moves) select(moves[event.key], true);
    else change(changes[event.key]);
  }

  /** Put the selected weight where the pointer is, on one of 256 even steps of the axis. */
  function drag(event) {
    const box = at("editor").getBoundingClientRect();
    const height = box.height - Charts.edges.top - Charts.edges.bottom;
    const up = 1 - (2 * (event.clientY - box.top - Charts.edges.top)) / height;
    change((Math.round(Math.min(1, Math.max(-1, up)) * 128) * state.top) / 128, true);
  }

  function onPointerDown(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    const box = at("editor").getBoundingClientRect();
    const { first, last } = pieceOf(state.selected);
    const width = box.width - Charts.edges.left - Charts.edges.right;
    const along = Math.floor(((event.clientX - box.left - Charts.edges.left) / width) * (last - first));
    if (along < 0 || along >= last - first) return;
    select(first + along, true);
    at("editor").setPointerCapture(event.pointerId);
    drag(event);
  }

  // ---- the result

  function compute() {
    const quantized = () => Arithmetic.quantize(state.weights, book(), config(), TABLES.scales);
    try {
      state.result = quantized();
    } catch (error) {
      at("double-quant").checked = false;
      refuse(error.message);
      state.result = quantized();
    }
  }

  function show(dragging = false) {
    const { result } = state;
    const piece = pieceOf(state.selected);
    scaleAxis(piece, dragging);
    const errors = result.decoded.map((value, i) => value - state.weights[i]);
    showFigures(result, piece, errors);
    showChoice(result, piece);
    showCharts(result, piece, errors);
    showBytes(result, piece);
    showScales(result, piece);
    showWeights(result, piece, errors);
  }

  /** The axis of the weights fits what is newly shown. Then it only grows: it would run after a weight that is raised from zero. */
  function scaleAxis(piece, dragging) {
    const fitting = Charts.range(state.weights.subarray(piece.first, piece.last));
    if (state.shown !== piece.first) state.top = fitting;
    else if (!dragging) state.top = Math.max(state.top, fitting);
    state.shown = piece.first;
  }

  function blockOf(piece, numbers) {
    const size = config().blocksize;
    return Array.from(numbers.slice(piece.block * size, (piece.block + 1) * size));
  }

  function showFigures(result, piece, errors) {
    const inBlock = blockOf(piece, errors);
    const square = inBlock.reduce((total, error) => total + error * error, 0) / inBlock.length;
    const count = state.weights.length;
    const figures = {
      "bits per weight, here": brief((8 * result.bytes) / count),
      "bits per weight, many blocks": brief(Arithmetic.bitsOfLargeWeight(book(), config())),
      [`bytes of ${count} weights`]: result.bytes,
      [`scale of block ${piece.block + 1}`]: exact(result.scales[piece.block]),
      "root mean square error of the block": brief(Math.sqrt(square)),
      "largest error of the block": brief(Math.max(...inBlock.map(Math.abs))),
    };
    at("figures").innerHTML = Object.entries(figures).map(([name, value]) => `<div><dt>${name}<dd>${value}</div>`).join("");
  }

  function showChoice(result, piece) {
    const pieces = [];
    for (let index = 0; index < state.weights.length; index = pieces.at(-1).last) pieces.push(pieceOf(index));
    const named = pieces.map(({ block, first, last }) => `<option value="${first}">block ${block + 1}, weights ${first + 1} to ${last}`);
    const options = named.join("");
    if (at("piece").innerHTML !== options) at("piece").innerHTML = options;
    at("piece").value = piece.first;
    at("place").max = state.weights.length;
    at("place").value = state.selected + 1;
    at("value").value = exact(state.weights[state.selected]);
    at("selected").textContent = described(state.selected);
  }

  /** What became of one weight, as a sentence. */
  function described(index) {
    const [result, { levels, bits: width }] = [state.result, book()];
    const code = result.codes[index];
    return (
      `Weight ${index + 1}: ${exact(state.weights[index])}; divided by the scale ${brief(result.scaled[index])}; ` +
      `nearest level ${brief(levels[code])}, code ${code} (${bits(code, width)}); decoded ${brief(result.decoded[index])}.`
    );
  }

  function showCharts(result, piece, errors) {
    const { selected, weights, top } = state;
    const { levels } = book();
    const divided = (weight) => (result.chosen[piece.block] ? weight / result.chosen[piece.block] : 0);
    Charts.editor(at("editor"), { ...piece, weights, decoded: result.decoded, selected, top, described });
    const chosen = [divided(weights[selected]), levels[result.codes[selected]]];
    Charts.density(at("density"), { levels, values: blockOf(piece, weights).map(divided), chosen });
    Charts.error(at("error"), { ...piece, errors, selected });
  }

  function showBytes(result, piece) {
    const [width, size] = [book().bits, config().blocksize];
    const [from, to] = [(state.selected * width) >> 3, (state.selected * width + width - 1) >> 3];
    const [first, last] = [(piece.first * width) >> 3, Math.ceil((piece.last * width) / 8)];
    const kind = (i) => (i >= from && i <= to ? ' class="now"' : i >= first && i < last ? ' class="chosen"' : "");
    const all = Array.from(result.packed, (byte, i) => `<i${kind(i)}>${hex(byte)}</i>`);
    const inBlock = (size * width) / 8;
    at("bytes").innerHTML = Array.from(
      result.chosen,
      (_, block) => `<p><b>block ${block + 1}</b> ${all.slice(block * inBlock, (block + 1) * inBlock).join(" ")}</p>`,
    ).join("");
    const where = from === to ? `byte ${from + 1}` : `bytes ${from + 1} and ${to + 1}`;
    at("order").textContent =
      `In hexadecimal. A weight takes ${width} bits, and the first weight lies in the highest bits of a byte. ` +
      `Weight ${state.selected + 1} lies in ${where}, marked strongly.`;
  }

  function showScales(result, piece) {
    const { nested, kept, chosen, scales } = result;
    at("nested").textContent = nested
      ? `Double quantization: a scale less their mean ${exact(nested.offset)}, divided by the largest such difference ` +
        `${Array.from(nested.largest, exact).join(", ")}, is stored as the nearest of 256 levels.`
      : kept
        ? "A scale is more than 50 times as large as most of the others, so that 8 bits would lose the small ones: minilora warns, " +
          "and the scales of this weight stay in float32."
        : "Each scale is a float32 number, 4 bytes a block.";
    const row = (scale, block) =>
      `<tr${block === piece.block ? ' class="chosen"' : ""}><td>${block + 1}<td>${exact(scale)}` +
      `<td>${nested ? nested.codes[block] : "-"}<td>${exact(scales[block])}</tr>`;
    at("scales").innerHTML = Array.from(chosen, row).join("");
  }

  function showWeights(result, { first, last }, errors) {
    const { levels, bits: width } = book();
    const rows = [];
    for (let i = first; i < last; i++) {
      const code = result.codes[i];
      const numbers = [levels[code], result.decoded[i], errors[i]].map(exact).join("<td>");
      rows.push(
        `<tr${i === state.selected ? ' class="chosen"' : ""}><td>${i + 1}<td>${exact(state.weights[i])}` +
          `<td>${exact(result.scaled[i])}<td>${code}<td>${bits(code, width)}<td>${numbers}</tr>`,
      );
    }
    at("weights").innerHTML = rows.join("");
  }

  // ---- start

  function listen() {
    for (const id of ["kind", "count", "seed"]) at(id).addEventListener("change", draw);
    for (const id of ["format", "blocksize", "scale", "signed-scale", "double-quant"]) {
      at(id).addEventListener("change", () => take(state.weights));
    }
    at("again").addEventListener("click", () => {
      at("seed").value = Number(at("seed").value) + 1;
      draw();
    });
    at("piece").addEventListener("change", () => select(Number(at("piece").value)));
    at("place").addEventListener("change", () => select(Math.round(Number(at("place").value)) - 1));
    at("value").addEventListener("change", () => {
      const value = Math.fround(Number(at("value").value));
      if (!Number.isFinite(value)) return refuse("Its value: wanted a finite float32 number.");
      refuse("");
      change(value);
    });
    for (const id of ["controls", "one"]) at(id).addEventListener("submit", (event) => event.preventDefault());
    at("own").addEventListener("submit", paste);
    at("editor").addEventListener("keydown", onKey);
    at("editor").addEventListener("pointerdown", onPointerDown);
    at("editor").addEventListener("pointermove", (event) => at("editor").hasPointerCapture(event.pointerId) && drag(event));
    at("editor").addEventListener("lostpointercapture", () => show());
    const charts = ["editor", "density", "error"].map(at);
    const measured = () => charts.map(Charts.measure).some(Boolean);
    new ResizeObserver(() => measured() && show()).observe(at("editor"));
    measured();
  }

  function fill(id, names, chosen) {
    at(id).innerHTML = names.map((name) => `<option value="${name}">${String(name).toUpperCase()}`).join("");
    at(id).value = chosen;
  }

  fill("format", Object.keys(TABLES.formats), "nf4");
  fill("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096], 64);
  listen();
  draw();
})();
