// The arithmetic of minilora's quantize() in JavaScript: weights to codes, bytes, scales and decoded weights, equal to the last bit.
//
//     block of 64 weights --(/ scale)--> values in [-1, 1] --(nearest level)--> codes --(packed)--> bytes
//
// JavaScript counts in float64. minilora counts in float32, so every single step is rounded with Math.fround, in minilora's order.
// There is no page in this file. The functions stand in the order of minilora/quant: lookup, scales, nested, blockwise.
"use strict";

const Arithmetic = (() => {
  const f = Math.fround;
  const TINY = f(1e-38); // guards the reciprocal of a block of zeros
  const NESTED = 256; // scales that share a scale of their own
  const OUTLIER = 50; // times the median: above it, scales are not packed
  const LANES = 8; // float32 numbers that PyTorch adds at a time on x86 processors

  // ---- lookup

  /** The code of the nearest level; a tie goes to the lower level. */
  function nearest(value, book) {
    const place = book.midpoints.findIndex((midpoint) => midpoint >= value);
    return book.codes[place < 0 ? book.midpoints.length : place];
  }

  /** Codes as a stream of bits, the first code in the highest bits of the first byte. An odd last half byte holds the code of zero. */
  function pack(codes, book) {
    const padded = book.bits === 4 && codes.length % 2 ? [...codes, nearest(0, book)] : codes;
    const bytes = new Uint8Array(Math.ceil((padded.length * book.bits) / 8));
    padded.forEach((code, place) => {
      for (let bit = 0; bit < book.bits; bit++) {
        const at = place * book.bits + bit;
        bytes[at >> 3] |= ((code >> (book.bits - 1 - bit)) & 1) << (7 - (at & 7));
      }
    });
    return bytes;
  }

  // ---- sums: a float32 sum depends on its order, so this is PyTorch's, for at most 8,192 numbers

  /** Sum of `count` numbers, 16 at a time. */
  function sumOfSixteens(number, count) {
    let total = 0;
    let part = 0;
    for (let i = 0; i < count; i++) {
      part = f(part + number(i));
      if (i % 16 === 15) [total, part] = [f(total + part), 0];
    }
    return f(part + total);
  }

  /** Sum of `count` numbers as four sums: of each fourth number from the first, from the second, and so on. */
  function sumOfFours(number, count) {
    const rounds = Math.floor(count / 4);
    const parts = [0, 1, 2, 3].map((from) => sumOfSixteens((i) => number(4 * i + from), rounds));
    for (let i = 4 * rounds; i < count; i++) parts[0] = f(parts[0] + number(i));
    return parts.reduce((total, part) => f(total + part));
  }

  /** Sum in float32: each lane of the processor adds every eighth number, and at the end the lanes are added. */
  function sum(numbers) {
    if (numbers.length < LANES) return sumOfFours((i) => numbers[i], numbers.length);
    const rounds = Math.floor(numbers.length / LANES);
    let total = 0;
    for (let i = rounds * LANES; i < numbers.length; i++) total = f(total + numbers[i]);
    for (let lane = 0; lane < LANES; lane++) total = f(total + sumOfFours((i) => numbers[i * LANES + lane], rounds));
    return total;
  }

  // ---- scales

  const clamped = (value) => Math.min(1, Math.max(-1, value));
  const guarded = (scale) => (Math.abs(scale) < TINY ? TINY : scale);
  const divided = (block, scale) => {
    const inverse = f(1 / guarded(scale));
    return Array.from(block, (weight) => clamped(f(weight * inverse)));
  };

  /** The largest magnitude of a block; with the sign of that weight if `signed`. Of equal ones the first counts. */
  function absmax(block, signed) {
    const largest = block.reduce((best, weight) => (Math.abs(weight) > Math.abs(best) ? weight : best));
    return signed ? largest : Math.abs(largest);
  }

  /** The scale of least squared error: for each trial scale the codes are fixed, and then the best scale for these codes is computed. */
  function searched(block, book, signed) {
    const start = absmax(block, book.signed);
    let [best, bestError] = [start, Infinity];
    const low = book.bits >= 4 ? 10 : 7; // twentieths; with few levels it pays to clip more
    const steps = Array.from({ length: 23 - low }, (_, i) => i + low);
    for (const step of [20, ...steps.filter((s) => s !== 20), ...(signed ? steps.map((s) => -s) : [])]) {
      const trial = f(start * f(step / 20));
      const levels = divided(block, trial).map((value) => book.levels[nearest(value, book)]);
      const square = Math.max(sum(levels.map((level) => f(level * level))), TINY);
      const fitted = f(sum(levels.map((level, i) => f(level * block[i]))) / square);
      for (const scale of step === 20 ? [fitted, trial] : [fitted]) {
        const errors = levels.map((level, i) => f(block[i] - f(level * scale)));
        const error = sum(errors.map((one) => f(one * one)));
        if (error < bestError && Number.isFinite(scale)) [best, bestError] = [scale, error];
      }
    }
    return best;
  }

  /** The scale of a block by the rule of a config. */
  function scaleOf(block, book, config) {
    if (config.scale === "mse") return searched(block, book, config.signedScale);
    return absmax(block, config.signedScale || book.signed);
  }

  // ---- nested: double quantization

  const groups = (numbers, size) =>
    Array.from({ length: Math.ceil(numbers.length / size) }, (_, i) => numbers.slice(i * size, (i + 1) * size));

  /** Whether a scale is so far above the median of its group that 8 bits would lose the others. */
  function hasOutlier(scales) {
    return groups(Float32Array.from(scales, Math.abs), NESTED).some((group) => {
      const used = group.filter((scale) => scale > 0).sort();
      return used.length > 0 && f(used[used.length - 1] / used[(used.length - 1) >> 1]) > OUTLIER;
    });
  }

  /** Scales in 8 bits: less their mean, divided by the largest of 256, each as the nearest of 256 `levels`. */
  function nest(scales, levels) {
    const offset = f(sum(scales) / scales.length);
    if (!Number.isFinite(offset)) throw new Error("The mean of the scales overflows float32; turn double quantization off.");
    const residuals = scales.map((scale) => f(scale - offset));
    const largest = Float32Array.from(groups(residuals, NESTED), (group) => absmax(group, false));
    const inverses = largest.map((one) => f(1 / one));
    const codes = Uint8Array.from(residuals, (residual, i) => {
      const scaled = f(residual * inverses[Math.floor(i / NESTED)]);
      const value = clamped(Number.isNaN(scaled) ? -1 : scaled); // equal scales: 0 x infinity
      const step = Math.trunc(f(f(f(value + 1) * 32767.5) + 0.5)); // the nearest of 65,536 even steps, and then its level
      const even = (step * 2) / 65535 - 1;
      return levels.findIndex((level, k) => k === levels.length - 1 || (level + levels[k + 1]) / 2 >= even);
    });
    const decoded = Float32Array.from(codes, (code, i) => f(f(levels[code] * largest[Math.floor(i / NESTED)]) + offset));
    return { codes, largest, offset, decoded };
  }

  // ---- blockwise

  /** A block of zeros keeps scale 0, but a last block that is not full gets a tiny scale: bitsandbytes stores it so. */
  function chosenScales(weights, book, config) {
    const size = config.blocksize;
    return Float32Array.from(groups(weights, size), (part) => {
      const full = part.length === size;
      const block = new Float32Array(size);
      block.set(part);
      const scale = scaleOf(block, book, config);
      return full || Math.abs(scale) >= TINY ? scale : TINY;
    });
  }

  /** A whole block is multiplied by the reciprocal of its scale; a last block that is not full is divided by it, as in bitsandbytes. */
  function scaledBy(part, scale, size) {
    return part.length === size ? divided(part, scale) : Array.from(part, (one) => clamped(f(one / guarded(scale))));
  }

  /**
   * Quantize a weight.
   *
   * weights: Float32Array, 1 to 4,096 finite numbers. book: {bits, signed, levels, midpoints, codes}, a format of TABLES.
   * config: {blocksize, scale: "absmax" or "mse", signedScale, doubleQuant}. scaleLevels: the 256 levels of 8-bit scales.
   *
   * Returns {scaled, codes, packed, chosen, nested, kept, scales, decoded, bytes}: weights divided by their scale; their codes; the bytes
   * of these; the scales that the rule chose; the scales in 8 bits, or null; whether double quantization was left out for an outlier;
   * the scales that decoding uses; the decoded weights; the number of bytes of codes and scales.
   */
  function quantize(weights, book, config, scaleLevels) {
    const size = config.blocksize;
    const chosen = chosenScales(weights, book, config);
    const scaled = Float32Array.from(groups(weights, size).flatMap((part, i) => scaledBy(part, chosen[i], size)));
    const codes = Uint8Array.from(scaled, (value) => nearest(value, book));
    const packed = pack(codes, book);
    const kept = config.doubleQuant && hasOutlier(chosen);
    const nested = config.doubleQuant && !kept ? nest(chosen, scaleLevels) : null;
    const scales = nested ? nested.decoded : chosen;
    const decoded = Float32Array.from(codes, (code, i) => f(book.levels[code] * scales[Math.floor(i / size)]));
    const ofScales = nested ? chosen.length + 4 * nested.largest.length + 4 : 4 * chosen.length;
    return { scaled, codes, packed, chosen, nested, kept, scales, decoded, bytes: packed.length + ofScales };
  }

  /** Bits per weight where there are so many blocks that the mean of the scales counts for nothing. */
  function bitsOfLargeWeight(book, config) {
    return book.bits + (config.doubleQuant ? 8 + 32 / NESTED : 32) / config.blocksize;
  }

  return { quantize, bitsOfLargeWeight };
})();
