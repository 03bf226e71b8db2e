// Random weights from a seed: the same seed draws the same weights in every browser. There is no page in this file.
"use strict";

const Draws = (() => {
  /** Uniform numbers in (0, 1): a linear congruential generator of 32 bits (Numerical Recipes, section 7.1), its high bits. */
  function uniform(seed) {
    let state = (seed ^ 0x2545f491) >>> 0;
    const next = () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return ((state >>> 8) + 0.5) / 2 ** 24;
    };
    for (let i = 0; i < 8; i++) next(); // seeds that are neighbours begin alike
    return next;
  }

  /** Standard normal numbers (Box and Muller 1958). */
  const normal = (random) => () => Math.sqrt(-2 * Math.log(random())) * Math.cos(2 * Math.PI * random());

  /** Student's t with 5 degrees of freedom: a normal number over the root of a mean of five squares. */
  function student(random) {
    const draw = normal(random);
    return () => {
      const squares = Array.from({ length: 5 }, () => draw() ** 2);
      return draw() / Math.sqrt(squares.reduce((total, one) => total + one) / 5);
    };
  }

  /** `count` weights as Float32Array. kind: "normal", "student", "outlier" (normal, and weight 20 is 8) or "zeros". */
  function weights(kind, count, seed) {
    const random = uniform(seed);
    const draw = { normal: normal(random), student: student(random), outlier: normal(random), zeros: () => 0 }[kind];
    const drawn = Float32Array.from({ length: count }, draw);
    if (kind === "outlier") drawn[Math.min(20, count) - 1] = 8;
    return drawn;
  }

  return { weights };
})();
