// The way to the daemon: reading, asking, and the live stream that comes back by itself.

const KEY = "stepguard.session";
export const session = {
  get: () => localStorage.getItem(KEY),
  set: (token) => localStorage.setItem(KEY, token),
  drop: () => localStorage.removeItem(KEY),
};

export class Trouble extends Error {
  constructor(code, message) { super(message); this.code = code; }
}

function headers(more = {}) {
  const token = session.get();
  return token ? { ...more, authorization: `Bearer ${token}` } : more;
}

async function understood(reply) {
  let answer = null;
  try { answer = await reply.json(); } catch { /* no JSON: said below */ }
  if (!reply.ok) throw new Trouble(reply.status, answer?.error ?? `the daemon answered ${reply.status}`);
  return answer;
}

export async function read(path) {
  return understood(await fetch(path, { headers: headers(), cache: "no-store" }));
}

export async function ask(verb, body) {
  return understood(await fetch(`/api/v1/${verb}`, {
    method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body),
  }));
}

// A link of `stepguard open` carries its code behind the #, which no server and no log ever sees.
export async function comeIn() {
  const code = new URLSearchParams(location.hash.slice(1)).get("code");
  if (!code) return null;
  history.replaceState(null, "", location.pathname);
  const opened = await ask("session", { code });
  session.set(opened.token);
  return opened.who;
}

// Not EventSource: that one can carry no session. Calls `take(event, data)`, and `gone(error)` at each break.
export async function follow(take, gone) {
  for (let wait = 1; ; wait = Math.min(wait * 2, 10)) {
    try {
      const reply = await fetch("/api/v1/live", { headers: headers(), cache: "no-store" });
      if (!reply.ok) await understood(reply);
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      take("open", null);
      for (let held = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        held += value;
        const parts = held.split("\n\n");
        held = parts.pop();
        for (const part of parts) {
          const [, name, data] = /^event: (.*)\ndata: (.*)$/s.exec(part) ?? [];
          if (name) take(name, JSON.parse(data));
        }
        wait = 1;
      }
      gone(null);
    } catch (error) {
      gone(error);
    }
    await new Promise((again) => setTimeout(again, wait * 1000));
  }
}
