// The page: takes in what the daemon tells, shows it, and asks before it asks the daemon for anything.

import { $, PHASES, clock, el, figure, isNumber, span, text, words } from "./words.js";
import { Trouble, ask, comeIn, follow, read, session } from "./talk.js";
import * as curve from "./curve.js";
import * as tiles from "./tiles.js";

const SILENT_AFTER_S = 8;
let status = null;
let heardAt = 0;
let notices = [];
let incidents = [];
let checkpoints = [];

// ---- what is shown

const tone = (name, mark, word) => { $("hero").dataset.tone = name; $("mark").textContent = mark; if ($("word").textContent !== word) $("word").textContent = word; };
const drift = () => (performance.now() - heardAt) / 1000;

function hero() {
  if (status === null) return;
  const phase = status.breaker?.phase;
  const [word, name, mark] = PHASES[phase] ?? [words(phase), "bad", "?"];
  const gone = status.trainer?.alive === false && ["closed", "half_open", "shadow"].includes(phase);
  tone(gone ? "warn" : name, gone ? "!" : mark, gone ? "Trainer gone" : word);
  const since = status.breaker?.since_s;
  $("since").textContent = isNumber(since) ? `since ${clock(Date.now() / 1000 - since - drift())}, for ${span(since + drift())}` : "since when is unknown";
  const told = status.incident ? about(status.incident) : status.breaker?.reason ? words(status.breaker.reason) : "";
  $("why").textContent = told;
  $("next").textContent = next(phase, gone);
  document.title = `${gone ? "Trainer gone" : word} · ${status.run ?? "Stepguard"}`;
}

// An incident in one line: what, where, since when, what it cost so far.
function about(one) {
  return [`${words(one.cause)}${one.server ? `: ${one.server}` : ""}`, isNumber(one.onset_step) ? `since step ${one.onset_step}` : null, tiles.did(one) || null,
    one.known_to ? `known to ${one.known_to}` : null].filter(Boolean).join(" · ");
}

// What happens next by itself, and whether anybody has to do anything.
function next(phase, gone) {
  const left = status.breaker?.probation_left;
  const repaired = (status.servers ?? []).filter((one) => one.stage).map((one) => `${one.name}: ${words(one.stage)}`);
  const more = repaired.length > 3 ? ` and ${repaired.length - 3} more` : "";
  const work = repaired.length ? ` (${repaired.slice(0, 3).join(", ")}${more})` : "";
  if (gone) return "The trainer is gone: start it again, with STEPGUARD_RUN_DIR set.";
  switch (phase) {
    case "open": return status.mode === "act" ? `Nothing to do yet: Stepguard is repairing it${work}.` : "Stepguard holds and repairs nothing in this mode: restart the server, or mend the cause.";
    case "half_open": return left ? `Nothing to do: ${left} more good step${left === 1 ? "" : "s"} end it.` : "Nothing to do: the run goes on and is watched closely.";
    case "forced_open": return "It stays held until somebody resumes it.";
    case "locked_out": return "A person is needed: nothing more is tried. Look at the incident below, then resume or roll back.";
    case "shadow": return "Everything is judged, nothing is held.";
    default: return repaired.length ? `The run goes on; under repair${work}.` : "";
  }
}

function show(now) {
  status = now;
  heardAt = performance.now();
  hero();
  $("run").textContent = text(now.run);
  $("mode").textContent = `mode ${text(now.mode)}`;
  $("mode").hidden = false;
  $("version").textContent = `Stepguard ${text(now.version)}, watching for ${span(now.uptime_s)}`;
  const newest = now.trainer?.reward;
  $("reward-now").textContent = newest === null || newest === undefined ? "" : isNumber(newest) ? figure(newest) : String(newest);
  const warnings = now.warnings ?? [];
  $("warnings").hidden = !warnings.length;
  $("warnings").replaceChildren(...warnings.map((one) => el("li", {}, one)));
  tiles.trainer(now); tiles.servers(now); tiles.gpus(now); tiles.host(now);
  foremost(Boolean(now.incident));
  const phase = now.breaker?.phase;
  const held = ["open", "forced_open", "locked_out"].includes(phase);
  $("do-resume").disabled = !held;
  $("do-pause").disabled = ["forced_open", "locked_out"].includes(phase);
  // Who lets go of a hold that is being repaired answers for it: the button invites only where a person is needed.
  $("do-resume").className = ["forced_open", "locked_out"].includes(phase) ? "primary" : "";
  $("do-restart").disabled = !(now.servers ?? []).length;
  $("do-shadow").textContent = now.mode === "shadow" ? "Shadow off" : "Shadow on";
}

// An open incident is what people come for: its story stands right under the state, and goes back when it is over.
function foremost(open) {
  const card = $("story-card");
  if (open === (card.previousElementSibling === $("warnings"))) return;
  if (open) $("warnings").after(card); else document.querySelector("main").append(card);
}

function silent(error) {
  if (error instanceof Trouble && error.code === 401) {
    $("pulse").textContent = "no session";
    tone("idle", "–", "Closed");
    $("since").textContent = "Reading this page needs a session.";
    $("why").textContent = "Run `stepguard open` on the machine of the run, and open the link that it prints.";
    $("next").textContent = "";
    return;
  }
  $("pulse").dataset.live = "no";
  $("pulse").textContent = "no connection, trying again";
  if (status === null || drift() > SILENT_AFTER_S) {
    tone("idle", "?", "No answer");
    $("since").textContent = status === null ? "The daemon does not answer." : `The daemon was last heard ${span(drift())} ago.`;
    $("why").textContent = "A dead daemon kills no run: a free trainer goes on, a held one stays held. See: stepguard status";
    $("next").textContent = "";
  }
}

async function retell() {
  [incidents, checkpoints, notices] = await Promise.all([read("/api/v1/incidents"), read("/api/v1/checkpoints"), read("/api/v1/events?limit=300")]);
  curve.setIncidents(incidents);
  curve.setCheckpoints(checkpoints);
  tiles.story(incidents, notices.filter((one) => one.incident === null));
}

let retelling = null;
function retellSoon() {
  retelling ??= setTimeout(() => { retelling = null; retell().catch(silent); }, 250);
}

function take(event, data) {
  if (event === "open") {
    $("pulse").dataset.live = "yes";
    $("pulse").textContent = "live";
    curve.load().catch(silent);
    retellSoon();
  } else if (event === "status") show(data);
  else if (event === "points") {
    if (data.missed) curve.load().catch(silent); else curve.append(data.points, data.total);
    if (data.points.some(([, step]) => step % 5 === 0)) retellSoon();
  } else retellSoon();
}

// ---- what is asked

function toast(message) {
  $("toast").textContent = message;
  $("toast").hidden = false;
  setTimeout(() => { $("toast").hidden = true; }, 6000);
}

const list = (...lines) => el("ul", {}, ...lines.filter(Boolean).map((line) => el("li", {}, line)));
const field = (label, input) => el("label", {}, label, input);
const whyField = () => field("Why (for the journal and the next person)", el("input", { id: "ask-why", maxLength: 500, autocomplete: "off" }));

// Says what will happen, and asks the daemon only when a person agrees. `wish` gives the body when they do.
function confirmThen({ title, body, yes, verb, wish }) {
  $("ask-title").textContent = title;
  $("ask-yes").textContent = yes;
  $("ask-yes").hidden = false;
  $("ask-no").textContent = "Cancel";
  $("ask-trouble").hidden = true;
  if (session.get() === null) return explainSession();
  $("ask-body").replaceChildren(...body, whyField());
  $("ask-form").onsubmit = async (submitted) => {
    submitted.preventDefault();
    $("ask-yes").disabled = true;
    try {
      const answer = await ask(verb, { why: $("ask-why").value.trim(), ...wish() });
      $("ask").close();
      toast(answer.message ?? `${title}: accepted.`);
    } catch (error) {
      if (error instanceof Trouble && error.code === 401) { session.drop(); explainSession(); return; }
      $("ask-trouble").textContent = error instanceof Trouble ? error.message : "The daemon does not answer.";
      $("ask-trouble").hidden = false;
    } finally {
      $("ask-yes").disabled = false;
    }
  };
  if (!$("ask").open) $("ask").showModal();
}

function explainSession() {
  $("ask-title").textContent = "This page may only look";
  $("ask-body").replaceChildren(
    el("p", {}, "To act, it needs a session. On the machine of the run, type"),
    el("p", {}, el("code", {}, "stepguard open")),
    el("p", {}, "and open the link that it prints. It is good once, for five minutes; the session then lasts twelve hours."));
  $("ask-yes").hidden = true;
  $("ask-no").textContent = "Close";
  $("ask-form").onsubmit = (submitted) => { submitted.preventDefault(); $("ask").close(); };
  if (!$("ask").open) $("ask").showModal();
}

function askPause() {
  confirmThen({ title: "Pause the run?", yes: "Pause", verb: "pause", wish: () => ({}), body: [list(
    "The trainer holds before its next optimizer step; a step under way is finished.",
    "Nothing is stopped and nothing is lost. Servers stay up.",
    "It stays held until a person resumes it.")] });
}

function askResume() {
  const phase = status?.breaker?.phase;
  confirmThen({ title: "Resume the run?", yes: "Resume", verb: "resume", wish: () => ({}), body: [list(
    phase === "forced_open" ? "The pause ends, and the trainer takes its next optimizer step." : "You let go of what holds the run, and answer for it.",
    phase === "forced_open" ? null : "Unproven weights are accepted, and a reward that fell becomes the new normal.",
    "A server that is dead holds the run all the same.")] });
}

function askRollback() {
  const onset = [status?.incident, status?.last_incident].map((one) => one?.onset_step).find(isNumber);
  const before = el("input", { id: "ask-step", type: "number", min: "0", step: "1", required: true, value: String(onset ?? status?.trainer?.committed_step ?? "") });
  const target = el("li", { "aria-live": "polite" });
  const say = () => {
    const usable = checkpoints.filter((one) => one.step < Number(before.value) && !one.quarantined && !["bad", "incomplete"].includes(one.verdict));
    const newer = checkpoints.filter((one) => one.step >= Number(before.value) && !one.quarantined).length;
    const newest = usable.reduce((best, one) => Math.max(best, one.step), -1);
    target.textContent = (newest >= 0 ? `The newest known checkpoint before it is of step ${newest}; it is vetted first.` : "No checkpoint before it is known here; the folder is looked through.")
      + (newer ? ` ${newer} newer ${newer === 1 ? "one is" : "ones are"} set aside, never deleted.` : "");
  };
  before.oninput = say;
  say();
  confirmThen({ title: "Roll back?", yes: "Roll back", verb: "rollback", wish: () => ({ before_step: Number(before.value) }), body: [
    field("To the newest good checkpoint before step", before),
    el("ul", {}, target, el("li", {}, "The trainer is held, loads it, and goes on as a new attempt. Batches under way are void."),
      el("li", {}, "It can be undone: ", el("code", {}, `stepguard rollback --undo ${checkpoints.at(-1)?.path.replace(/\/[^/]*\/?$/, "") ?? "THE-FOLDER-OF-CHECKPOINTS"}`)))] });
}

function askRestart() {
  const all = status?.servers ?? [];
  const which = el("select", { id: "ask-server" }, ...all.map((one) => el("option", { value: one.name }, `${one.name} (${words(one.state)})`)));
  confirmThen({ title: "Restart a server?", yes: "Restart", verb: "restart-server", wish: () => ({ server: which.value }), body: [
    field("Server", which),
    list("Its whole process tree is ended, politely first, and started again.",
      "It must generate and prove that its weights are current before it is used.",
      "The run is held meanwhile where too few servers are left; rollouts under way on it are void.",
      "Its restart budget starts anew.")] });
}

function askShadow() {
  if (status?.mode !== "shadow") {
    return confirmThen({ title: "Switch shadow on?", yes: "Only watch", verb: "mode", wish: () => ({ mode: "shadow" }), body: [list(
      "Stepguard goes on judging and telling, and holds nothing.",
      status?.gate?.order !== "GO" ? "The run is held now: it will be let go." : null,
      "No server is restarted, nothing is rolled back. Optimizer steps on garbage become possible.")] });
  }
  const mode = el("select", { id: "ask-mode" }, el("option", { value: "hold" }, "hold: hold the run and tell people"), el("option", { value: "act" }, "act: also restart and roll back"));
  confirmThen({ title: "Switch shadow off?", yes: "Protect", verb: "mode", wish: () => ({ mode: mode.value }), body: [
    field("Mode", mode), list("From now on bad batches are refused and the run is held where it must be.", "If something is wrong already, it holds at once.")] });
}

// ---- begin

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${name}`;
  localStorage.setItem("stepguard.theme", name);
  curve.draw();
}

$("theme").onclick = () => theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
theme(THEMES.includes(localStorage.getItem("stepguard.theme")) ? localStorage.getItem("stepguard.theme") : "auto");
$("ask-no").onclick = () => $("ask").close();
$("do-pause").onclick = askPause;
$("do-resume").onclick = askResume;
$("do-rollback").onclick = askRollback;
$("do-restart").onclick = askRestart;
$("do-shadow").onclick = askShadow;
setInterval(() => { if (status !== null && drift() < SILENT_AFTER_S) hero(); else if (status !== null) silent(null); }, 1000);
try {
  const who = await comeIn();
  if (who) toast(`You may act here now, as ${who}.`);
} catch (error) {
  toast(error.message);
}
curve.begin();
follow(take, silent);
document.documentElement.dataset.ready = "yes";
