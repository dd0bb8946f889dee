// The reward curve: lines by attempt, bands for incidents, marks for checkpoints. Drawn by plotly, once it is there.

import { $, clock, figure, isNumber, words } from "./words.js";
import { read } from "./talk.js";

const GROWN = 1000; // points that came live, before the server is asked for a thinner curve again
const state = { lines: [], incidents: [], checkpoints: [], byTime: false, window: null, drawn: false, due: false, metric: null };
let plotly = null;

const colour = (name) => {
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};

export async function load() {
  const window = state.window && !state.byTime ? `&from_step=${Math.floor(state.window[0])}&to_step=${Math.ceil(state.window[1])}` : "";
  // Two for each pixel, a peak and a trough: more would be drawn over each other.
  const points = Math.min(4000, Math.max(500, 2 * $("plot").clientWidth));
  const found = await read(`/api/v1/series?points=${points}${window}`);
  state.lines = found.lines;
  state.total = found.points;
  state.grown = 0;
  draw();
}

// The newest points of `total`; those that an answer to `load` brought already are not drawn twice.
export function append(points, total) {
  if (state.total !== undefined) points = points.slice(Math.max(0, points.length - Math.max(0, total - state.total)));
  for (const [attempt, step, time, value] of points) {
    let line = state.lines.at(-1);
    if (!line || line.attempt !== attempt || step <= line.steps.at(-1)) {
      line = { attempt, steps: [], times: [], values: [] };
      state.lines.push(line);
    }
    line.steps.push(step); line.times.push(time); line.values.push(value);
  }
  state.total = Math.max(total, state.total ?? 0);
  state.grown = (state.grown ?? 0) + points.length;
  if (state.grown > GROWN) load().catch(() => {}); else draw();
}

export function setIncidents(incidents) { state.incidents = incidents; draw(); }
export function setCheckpoints(checkpoints) { state.checkpoints = checkpoints; draw(); }
export function setMetric(metric) { state.metric = metric; }

export function begin() {
  $("by-step").onclick = () => choose(false);
  $("by-time").onclick = () => choose(true);
  $("whole").onclick = () => { state.window = null; state.revision = (state.revision ?? 0) + 1; load().catch(() => {}); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const script = document.createElement("script");
  script.src = "/static/plotly.min.js";
  script.onload = () => { plotly = window.Plotly; draw(); };
  script.onerror = () => { $("plot-empty").textContent = "The curve cannot be drawn: the daemon's package plotly is missing."; };
  document.head.append(script);
}

function choose(byTime) {
  state.byTime = byTime;
  state.window = null;
  state.revision = (state.revision ?? 0) + 1;
  $("by-step").setAttribute("aria-pressed", String(!byTime));
  $("by-time").setAttribute("aria-pressed", String(byTime));
  load().catch(() => draw());
}

export function draw() {
  if (state.due) return;
  state.due = true;
  setTimeout(() => { state.due = false; drawNow(); }, document.hidden ? 2000 : 60);
}

// What the pointer reads at each point: worked out once for each.
function said(line) {
  line.said ??= [];
  for (let at = line.said.length; at < line.steps.length; at++) line.said.push([line.steps[at], clock(line.times[at])]);
  return line.said;
}

const x = (line) => (state.byTime ? line.times.map((time) => new Date(time * 1000)) : line.steps);

// Where a step lies on the axis in use; by time, the moment of the nearest point at or after it.
function place(step, wall) {
  if (!state.byTime) return step;
  if (isNumber(wall)) return new Date(wall * 1000);
  for (const line of state.lines.toReversed()) {
    const at = line.steps.findIndex((known) => known >= step);
    if (at >= 0) return new Date(line.times[at] * 1000);
  }
  return null;
}

function bands() {
  const shapes = [];
  const last = state.lines.at(-1);
  const now = state.byTime ? new Date() : last?.steps.at(-1) ?? 0;
  const band = (from, to, fillcolor) => {
    if (from === null || to === null || from === undefined || to === undefined) return;
    shapes.push({ type: "rect", xref: "x", yref: "paper", x0: from, x1: to, y0: 0, y1: 1, fillcolor, line: { width: 0 }, layer: "below" });
  };
  for (const one of state.incidents) {
    const onset = one.onset_step ?? one.opened_step;
    const start = onset === null ? null : state.byTime ? place(onset) ?? place(null, one.opened_at) : onset;
    const resumed = one.resumed_at === null ? now : place(one.resumed_step ?? one.opened_step, one.resumed_at);
    band(start, resumed, colour("band"));
    if (one.resumed_at !== null) band(resumed, one.closed_at === null ? now : place(one.closed_step, one.closed_at), colour("band-soft"));
    const held = place(one.opened_step, one.opened_at);
    if (held !== null) shapes.push({ type: "line", xref: "x", yref: "paper", x0: held, x1: held, y0: 0, y1: 1, line: { color: colour("bad"), width: 1.5, dash: "dash" } });
  }
  return shapes;
}

function marks() {
  const kind = (one) => (one.quarantined ? 3 : one.verdict === "bad" || one.verdict === "incomplete" ? 2 : one.proven ? 0 : 1);
  const symbols = ["diamond", "diamond-open", "x", "square-open"];
  const colours = [colour("good"), colour("muted"), colour("bad"), colour("muted")];
  const names = ["proven", "not proven yet", "bad", "quarantined"];
  const shown = state.checkpoints.filter((one) => isNumber(one.step) && place(one.step) !== null);
  return {
    type: "scatter", mode: "markers", x: shown.map((one) => place(one.step)), y: shown.map(() => 0.04), yaxis: "y2",
    marker: { symbol: shown.map((one) => symbols[kind(one)]), color: shown.map((one) => colours[kind(one)]), size: 10, line: { width: 1.6 } },
    text: shown.map((one) => `checkpoint of step ${one.step}, ${names[kind(one)]}`), hovertemplate: "%{text}<extra></extra>",
  };
}

function flags() {
  const shown = state.incidents.filter((one) => place(one.onset_step ?? one.opened_step) !== null && (one.onset_step ?? one.opened_step) !== null);
  return {
    type: "scatter", mode: "markers", x: shown.map((one) => place(one.onset_step ?? one.opened_step)), y: shown.map(() => 0.97), yaxis: "y2",
    marker: { symbol: "triangle-down", color: colour("bad"), size: 10 },
    text: shown.map((one) => `incident ${one.id}: ${words(one.cause)}<br>onset at step ${one.onset_step ?? "unknown"}, held at step ${one.opened_step ?? "unknown"}, ${clock(one.opened_at)}`),
    hovertemplate: "%{text}<extra></extra>",
  };
}

function drawNow() {
  const count = state.lines.reduce((sum, line) => sum + line.steps.length, 0);
  const last = state.lines.at(-1);
  const values = state.lines.flatMap((line) => line.values).filter(isNumber);
  $("plot-empty").hidden = count > 0 && plotly !== null;
  $("curve-note").textContent = count ? `${(state.total ?? count).toLocaleString("en")} steps` : "";
  $("whole").hidden = state.window === null;
  if (!count || plotly === null) return;
  $("plot").setAttribute("aria-label",
    `The reward curve: ${figure(last.values.findLast(isNumber) ?? null)} at step ${last.steps.at(-1)}, ` +
    `between ${figure(Math.min(...values))} and ${figure(Math.max(...values))}, ${state.incidents.length} incidents`);
  const lines = state.lines.map((line, at) => ({
    type: "scatter", mode: line.steps.length < 40 ? "lines+markers" : "lines", x: x(line), y: line.values, connectgaps: false,
    customdata: said(line),
    line: { color: colour(at === state.lines.length - 1 ? "accent" : "faint"), width: at === state.lines.length - 1 ? 2 : 1.4 },
    marker: { size: 4 },
    hovertemplate: `reward <b>%{y:.4g}</b><br>step %{customdata[0]}, attempt ${line.attempt}<br>%{customdata[1]}<extra></extra>`,
  }));
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, tickfont: { color: colour("muted"), size: 12 }, automargin: true };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest", dragmode: "zoom",
    margin: { l: 44, r: 14, t: 10, b: 34 }, uirevision: state.revision ?? 0,
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("muted") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("edge"), font: { color: colour("text"), size: 13 } },
    xaxis: { ...axis, type: state.byTime ? "date" : "linear", showgrid: false }, yaxis: { ...axis, fixedrange: true },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    shapes: bands(),
  };
  plotly.react("plot", [...lines, marks(), flags()], layout, { displayModeBar: false, responsive: true, doubleClick: "reset" });
  if (!state.drawn) {
    state.drawn = true;
    $("plot").on("plotly_relayout", (change) => {
      const from = change["xaxis.range[0]"], to = change["xaxis.range[1]"];
      if (from === undefined && !change["xaxis.autorange"]) return;
      state.window = from === undefined ? null : [from, to];
      if (!state.byTime) load().catch(() => {}); else draw();
    });
  }
}
