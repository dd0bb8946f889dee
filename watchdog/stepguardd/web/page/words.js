// What the daemon's figures are called, and small ways to put them on the page. Text is only ever set as text.

export const PHASES = {
  closed: ["Going", "good", "✓"],
  half_open: ["On probation", "info", "↻"],
  open: ["Held", "bad", "❚❚"],
  shadow: ["Watched only", "calm", "◌"],
  forced_open: ["Paused", "warn", "❚❚"],
  locked_out: ["Locked out", "bad", "✕"],
};

export const SERVER_TONES = {
  serving: "good", planned: "info", starting: "warn", suspect: "warn", restarting: "warn", stale: "bad", dead: "bad",
};

export const $ = (id) => document.getElementById(id);

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const words = (code) => String(code ?? "unknown").replaceAll("_", " ").toLowerCase();
export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
export const text = (value) => (value === null || value === undefined || value === "" ? "unknown" : String(value));

export function figure(value) {
  if (!isNumber(value)) return "unknown";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 10 ? 3 : 1 });
}

export function span(seconds) {
  if (!isNumber(seconds)) return "unknown";
  const whole = Math.max(0, Math.floor(seconds));
  for (const [size, unit, small, smallUnit] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole >= size) return `${Math.floor(whole / size)} ${unit} ${Math.floor((whole % size) / small)} ${smallUnit}`;
  }
  return seconds < 10 ? `${Math.max(0, seconds).toFixed(1)} s` : `${whole} s`;
}

export function bytes(count) {
  if (!isNumber(count)) return "unknown";
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"]]) {
    if (Math.abs(count) >= size) return `${(count / size).toFixed(count / size < 10 ? 1 : 0)} ${unit}`;
  }
  return `${Math.round(count / 1024)} KiB`;
}

// Made once: to make one costs more than to use it a hundred times, and a curve has thousands of times.
const TIME = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

export function clock(wall) {
  const at = new Date(wall * 1000), now = new Date();
  const today = at.getDate() === now.getDate() && at.getMonth() === now.getMonth() && at.getFullYear() === now.getFullYear();
  return today ? TIME.format(at) : `${DAY.format(at)} ${TIME.format(at)}`;
}
