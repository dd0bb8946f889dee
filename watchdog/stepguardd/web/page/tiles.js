// The tiles and the incidents: what is there now, and what happened. What a daemon does not tell is "unknown".

import { $, SERVER_TONES, bytes, clock, el, figure, isNumber, span, text, words } from "./words.js";

const HEAT_FROM = 13;
const LISTED = 12;
const WORST = ["dead", "stale", "suspect", "restarting", "starting", "planned", "serving"];
const first = (from, ...keys) => keys.map((key) => from?.[key]).find((value) => value !== undefined && value !== null) ?? null;

const rows = (pairs) => el("dl", { class: "rows" }, ...pairs.filter(Boolean).map(([name, value, tone]) =>
  el("div", {}, el("dt", {}, name), el("dd", { class: tone ? `tone-${tone}` : "" }, value))));

function put(id, ...children) { $(id).replaceChildren(...children); }

export function trainer(status) {
  const one = status.trainer ?? {};
  const known = one.phase && one.phase !== "UNKNOWN"; // many trainers report steps and no phases
  const step = isNumber(one.step) ? `step ${one.step.toLocaleString("en")}` : "";
  const alive = one.alive === true ? ["alive", "good"] : one.alive === false ? ["gone", "bad"] : ["not seen", "warn"];
  put("trainer",
    el("p", { class: "big" }, ...(known ? [words(one.phase), " ", el("small", {}, step)] : [step || (one.alive ? "no step yet" : "not seen")])),
    rows([
      ["Process", alive[0], alive[1]],
      ["Last beat", isNumber(one.beat_age_s) ? `${span(one.beat_age_s)} ago` : "unknown"],
      ["Attempt", text(one.attempt)],
      ["Weights", text(one.weight_version)],
      ["Gate", text(status.gate?.order)],
      ["Batches refused", text(status.refused_batches)],
      status.prompts ? ["Prompts", `${text(status.prompts.suspected)} suspected, ${text(status.prompts.withheld)} withheld`, status.prompts.suspected ? "warn" : ""] : null,
    ]));
}

export function servers(status) {
  const all = status.servers ?? [];
  if (!all.length) return put("servers", el("p", { class: "empty" }, "No server is watched: the reward stream and the trainer alone."));
  const serving = all.filter((one) => one.state === "serving").length;
  const head = el("p", { class: "big" }, `${serving}`, el("small", {}, ` of ${all.length} serving`));
  const ranked = [...all].sort((a, b) => WORST.indexOf(a.state) - WORST.indexOf(b.state));
  const name = (one) => [one.name ?? "server", `${words(one.state)}${one.stage ? `, ${words(one.stage)}` : ""} · ${span(one.since_s)}`, SERVER_TONES[one.state] ?? "bad"];
  const left = first(status.budget, "restarts_left");
  const budget = left === null ? null : ["Restarts left", text(left)];
  if (all.length < HEAT_FROM) return put("servers", head, rows([...ranked.map(name), budget]));
  const counted = WORST.map((state) => [state, all.filter((one) => one.state === state).length]).filter(([, count]) => count);
  const counts = el("ul", { class: "counts" }, ...counted.map(([state, count]) => el("li", {}, el("i", { class: SERVER_TONES[state] ?? "bad" }), `${count.toLocaleString("en")} ${words(state)}`)));
  const away = ranked.filter((one) => one.state !== "serving");
  const more = away.length > LISTED ? el("p", { class: "note" }, `and ${away.length - LISTED} more that do not serve`) : null;
  put("servers", head, counts, el("div", { class: "fleet" }, heat(all, counted),
    el("div", {}, rows([...away.slice(0, LISTED).map(name), budget]), more)));
}

// One cell a server, kept from look to look: of a thousand few change.
const cells = { node: null, of: [] };
function heat(all, counted) {
  if (cells.node === null) {
    cells.node = el("div", { class: "heat", role: "img" });
    cells.said = el("p", { class: "note" }, "Point at a server, or touch it, to read which it is.");
    cells.whole = el("div", {}, cells.node, cells.said);
    cells.node.onpointerover = cells.node.onclick = ({ target }) => { if (target.title) cells.said.textContent = target.title; };
  }
  cells.node.setAttribute("aria-label", counted.map(([state, count]) => `${count} ${words(state)}`).join(", "));
  while (cells.of.length > all.length) cells.of.pop().remove();
  while (cells.of.length < all.length) cells.of.push(cells.node.appendChild(document.createElement("i")));
  all.forEach((one, at) => {
    const cell = cells.of[at];
    const tone = SERVER_TONES[one.state] ?? "bad";
    const title = `${one.name}: ${words(one.state)}`;
    if (cell.className !== tone) cell.className = tone;
    if (cell.title !== title) cell.title = title;
  });
  return cells.whole;
}

// A server fills its GPU to nine tenths by design: tight is what little of it is left beyond that.
function meter(name, used, total) {
  const share = isNumber(used) && isNumber(total) && total > 0 ? used / total : null;
  const tone = share === null ? "" : share > 0.97 ? "full" : share > 0.93 ? "tight" : "";
  const bar = el("i", { class: tone });
  bar.style.width = `${Math.min(100, 100 * (share ?? 0))}%`;
  const free = share === null ? "unknown" : `${bytes(total - used)} free of ${bytes(total)}`;
  return el("div", { class: "meter" }, el("div", {}, el("span", {}, name), el("span", {}, free)), el("div", { class: "bar" }, bar));
}

export function gpus(status) {
  const all = status.gpus ?? [];
  if (!all.length) return put("gpus", el("p", { class: "empty" }, "No GPU is seen on this machine."), status.unseen?.GPUs ? el("p", { class: "note" }, status.unseen.GPUs) : "");
  const hot = all.map((one) => one.temperature_c).filter(isNumber);
  put("gpus", el("p", { class: "big" }, String(all.length), el("small", {}, hot.length ? ` · hottest ${Math.max(...hot)} °C` : "")),
    ...all.slice(0, 8).map((one, at) => meter(`GPU ${first(one, "index") ?? at}`,
      first(one, "used_bytes"), first(one, "total_bytes"))),
    all.length > 8 ? el("p", { class: "note" }, `and ${all.length - 8} more`) : "");
}

export function host(status) {
  const one = status.host ?? {};
  const total = first(one, "total_bytes"), available = first(one, "available_bytes");
  const meters = isNumber(total) ? [meter("Memory", isNumber(available) ? total - available : null, total)] : [];
  const kills = first(one, "oom_kills");
  put("host", el("p", { class: "big" }, isNumber(available) ? bytes(available) : "unknown", el("small", {}, " memory free")), ...meters, rows([
    ["OOM kills seen", text(kills), kills > 0 ? "warn" : ""],
  ]), ...Object.entries(status.unseen ?? {}).filter(([what]) => what !== "GPUs").slice(0, 4).map(([what, why]) => el("p", { class: "note" }, `Not watched: ${what}: ${why}`)));
}

const KINDS = { would: "would hold", called: "call" };

function timeline(notices) {
  return el("div", { class: "line" }, ...notices.flatMap((one) => [
    el("time", { dateTime: new Date(one.time * 1000).toISOString() }, clock(one.time)), el("em", {}, KINDS[one.what] ?? words(one.what)), el("p", {}, one.text),
  ]));
}

// What an incident cost so far, in words; "" for nothing.
export const did = (one) => [["restarts", "restart"], ["resyncs", "re-sync"], ["rollbacks", "rollback"], ["relaunches", "relaunch"], ["refused_batches", "refused batch"]]
  .filter(([key]) => one[key]).map(([key, word]) => `${one[key]} ${word}${one[key] === 1 ? "" : word.endsWith("ch") ? "es" : "s"}`).join(" · ");

function incident(one, open) {
  const stage = { held: ["held now", "bad"], probation: ["on probation", "info"], closed: ["over", "good"] }[one.stage] ?? [one.stage, ""];
  const held = (one.resumed_at ?? one.closed_at ?? Date.now() / 1000) - one.opened_at;
  const facts = [isNumber(one.onset_step) ? `since step ${one.onset_step}` : null, `held ${span(held)}`, did(one)].filter(Boolean).join(" · ");
  const summary = el("summary", {}, el("b", {}, `${one.id}. ${words(one.cause)}${one.server ? `, ${one.server}` : ""}`),
    el("span", { class: `badge ${stage[1]}` }, stage[0]), el("span", {}, facts), el("span", {}, clock(one.opened_at)));
  const evidence = Array.isArray(one.evidence) ? one.evidence : Object.entries(one.evidence ?? {}).map(([key, value]) => `${words(key)} ${figure(value)}`);
  const inside = el("div", { class: "inside" },
    evidence.length ? el("ul", { class: "evidence", "aria-label": "Evidence" }, ...evidence.map((line) => el("li", {}, line))) : null,
    one.known_to ? el("p", { class: "note" }, `Known to ${one.known_to}`) : null,
    one.notices.length ? timeline(one.notices) : el("p", { class: "empty" }, one.actions.join("; ") || "Nothing was told of it."));
  return el("details", { open, "data-incident": String(one.id) }, summary, inside);
}

export function story(incidents, others) {
  const opened = new Set([...document.querySelectorAll("details[open]")].map((one) => one.dataset.incident));
  const known = new Set([...document.querySelectorAll("details")].map((one) => one.dataset.incident));
  $("story-count").textContent = incidents.length ? String(incidents.length) : "";
  const parts = incidents.map((one, at) => incident(one, known.has(String(one.id)) ? opened.has(String(one.id)) : at === 0));
  if (others.length) {
    parts.push(el("details", { open: opened.has("others"), "data-incident": "others" }, el("summary", {}, el("b", {}, "Beside incidents"), el("span", {}, `${others.length} notice${others.length === 1 ? "" : "s"}`)),
      el("div", { class: "inside" }, timeline(others.slice(-60).toReversed()))));
  }
  put("story", ...(parts.length ? parts : [el("p", { class: "empty" }, "No incident yet. Each one will stand here with what was seen, what was done and what it cost.")]));
}
