/* Numbers on axes, words beside levels, and how lines of one arm are told apart by their rates. */
"use strict";

/* Distances of ticks on an axis of steps: whole numbers. */
const WHOLE = Array.from({ length: 16 }, (_, i) => 10 ** i).flatMap((unit) => [unit, 2 * unit, 5 * unit]);

/* Ticks of a logarithmic axis that have a number: 1, 2 and 5 times powers of ten, the powers alone over three decades. */
function round(ticks) {
  const known = ticks.filter((tick) => tick > 0), wide = known.length && known.at(-1) >= 1e3 * known[0];
  const chosen = ticks.map((tick) => {
    const first = Number(tick.toExponential(6).split("e")[0]);
    return (wide ? [1] : [1, 2, 5]).includes(first) ? tick : null;
  });
  return chosen.filter((tick) => tick !== null).length > 1 ? chosen : ticks;
}
/* Ticks of a logarithmic axis: 1 to 9 times powers of ten; evenly spaced ones where fewer than two of these are in it.
   (uPlot counts from the axis's own end, which is no round number.) */
function logarithmic(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (let digit = 1; digit < 10; digit++) ticks.push(Number(`${digit}e${power}`));
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  if (inside.length > 1) return inside;
  const unit = 10 ** Math.floor(Math.log10(high - low)), size = [0.2, 0.5, 1, 2].map((m) => m * unit).find((m) => (high - low) / m <= 6) || unit;
  const first = Math.ceil(low / size);
  return Array.from({ length: Math.floor(high / size) - first + 1 }, (_, i) => Number(((first + i) * size).toPrecision(12)));
}

/* Every tried rate has its number; turned where they would run into each other side by side, and left out where even so. */
const LETTER = 7.5, TURNED = 14, TURN = -60;
function crowded(rates, texts, place) {
  return rates.some((rate, i) => i && place(rate) - place(rates[i - 1]) < (LETTER * (texts[i].length + texts[i - 1].length)) / 2 + 4);
}
function legible(rates, place) {
  let last = -Infinity;
  return rates.map((rate) => {
    if (place(rate) - last < TURNED) return null;
    last = place(rate);
    return rate;
  });
}
/* The ticks of an axis of learning rates: those of the plot's values. */
function rateTicks(rates) {
  const place = (u) => (rate) => u.valToPos(rate, "x"), texts = rates.map(shown);
  const turned = (u) => crowded(rates, texts, place(u));
  return {
    splits: (u, axis, low, high) => rates.filter((rate) => rate >= low && rate <= high),
    filter: (u, ticks) => (turned(u) ? legible(ticks, place(u)) : ticks),
    rotate: (u) => (turned(u) ? TURN : 0),
    size: (u) => (turned(u) ? 18 + 6.5 * largest(texts.map(({ length }) => length)) : 34),
  };
}

/* Words of a level, in short lines: they stand right of everything that is drawn, where a second axis leaves less room. */
const MARGIN = [9, 5];
function broken(text, axis) {
  return text.split(" ").reduce((lines, word) => {
    const last = lines.at(-1);
    if (last !== undefined && last.length + word.length < MARGIN[axis]) lines[lines.length - 1] = `${last} ${word}`; else lines.push(word);
    return lines;
  }, []);
}

/* From the lowest rate to the highest, lines become stronger and less broken; many lines, whose dashes nobody could follow,
   stronger alone. */
const RAMP = [[2, 3], [5, 3], [10, 3], []], MOST_DASHED = 60;
const rampDash = (shade, { lines }) => (lines.length > MOST_DASHED ? [] : RAMP[Math.round(shade * (RAMP.length - 1))]);
function rampSwatch(shade, panel) {
  const swatch = element("span", undefined, { class: "swatch ramp" }), [on, off] = rampDash(shade, panel), color = shadeOf(theme.plain, shade);
  swatch.style.background = on ? `repeating-linear-gradient(90deg, ${color} 0 ${on}px, transparent ${on}px ${on + off}px)` : color;
  return swatch;
}
