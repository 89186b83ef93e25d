"use strict";
// Draws what /status and /recent say, and asks again every two seconds while somebody looks. What comes from there
// gets into the page as text nodes alone: a reason or a topic may hold anything.
const POLL_MS = 2000, GIVE_UP_MS = 5000;
// Two samples further apart than this have a hole between them.
const HOLE_SECONDS = 12;

const $ = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;
const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const make = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (known(text)) node.textContent = text;
  return node;
};
const draw = (name, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};

// Numbers and times, as [value, unit].
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const rough = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const plain = (value) => (Math.abs(value) >= 100 ? whole : rough).format(value);
const count = (value) => [plain(value), ""];
const perSecond = (value) => [plain(value), "/s"];
const duration = (seconds) => {
  if (seconds === 0) return ["0", "s"];
  if (seconds < 0.001) return [rough.format(seconds * 1e6), "µs"];
  if (seconds < 1) return [rough.format(seconds * 1e3), "ms"];
  if (seconds < 60) return [(Math.round(seconds * 10) / 10).toString(), "s"];
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = parts.findIndex(([, size]) => seconds >= size);
  let rest = Math.round(seconds);
  const words = parts.slice(first, first + 2).map(([unit, size]) => {
    const whole = Math.floor(rest / size);
    rest -= whole * size;
    return whole ? whole + " " + unit : "";
  });
  return [words.filter(Boolean).join(" "), ""];
};
const text = ([value, unit]) => (unit && unit !== "/s" ? value + " " + unit : value + unit);
const events = (n, one = "event", many = "events") => plain(n) + " " + (n === 1 ? one : many);

// The four charts: what they show, in which unit, and the least height of the scale.
const CHARTS = [
  { id: "rate", lines: [["published", "published_per_second"], ["rejected", "rejected_per_second"]], unit: perSecond, least: 1 },
  { id: "lag", lines: [["lag", "lag_seconds"]], unit: duration, least: 1 },
  { id: "latency", lines: [["half within", "claim_p50_seconds"], ["99 % within", "claim_p99_seconds"]], unit: duration, least: 0.01 },
  { id: "backlog", lines: [["pending", "pending"]], unit: count, least: 10 },
];
for (const chart of CHARTS) {
  const figure = $(chart.id), plot = make("div", "plot");
  chart.name = figure.querySelector("figcaption").firstChild.textContent.trim();
  chart.value = make("p", "value");
  chart.beside = make("p", "beside");
  chart.svg = draw("svg", { viewBox: "0 0 900 100", preserveAspectRatio: "none", role: "img" });
  chart.top = make("span", "top");
  chart.empty = make("span", "empty", "Nothing measured yet");
  chart.cursor = make("div", "cursor");
  chart.tip = make("div", "tip");
  chart.cursor.hidden = chart.tip.hidden = true;
  plot.append(chart.svg, chart.top, chart.empty, chart.cursor, chart.tip);
  const axis = make("div", "axis");
  chart.begin = make("span", "");
  axis.append(chart.begin, make("span", "", "now"));
  figure.append(chart.value, chart.beside, plot, axis);
  plot.addEventListener("pointermove", (event) => point(chart, plot, event));
  plot.addEventListener("pointerleave", () => { chart.cursor.hidden = chart.tip.hidden = true; });
}

// The next of 1, 2, 5, 10, ... at or above the value.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value * 0.999);
}

function drawChart(chart, samples, span) {
  chart.samples = samples;
  chart.span = span;
  say(chart.begin, text(duration(span)) + " ago");
  const values = chart.lines.flatMap(([, column]) => samples[column]).filter(known);
  const ages = samples.age_seconds, top = ceiling(Math.max(chart.least, ...values));
  const x = (age) => +(900 - (age / span) * 900).toFixed(1), y = (value) => +(100 - (value / top) * 100).toFixed(2);
  const nodes = [0, 50, 100].map((at) => draw("line", { x1: 0, x2: 900, y1: at, y2: at }));
  samples.outage.forEach((outage, n) => {
    const width = n > 0 ? Math.min(ages[n - 1] - ages[n], HOLE_SECONDS) : 5;
    if (outage) nodes.push(draw("rect", { x: x(ages[n] + width), y: 0, width: (width / span) * 900, height: 100 }));
  });
  chart.lines.forEach(([, column], line) => {
    const series = samples[column];
    if (line > 0 && !series.some((value) => value > 0)) return;
    let path = "", area = "", begun = null, last = null;
    const close = () => { if (begun !== null) area += `L${x(ages[last])} 100L${begun} 100Z`; begun = null; };
    series.forEach((value, n) => {
      if (!known(value)) return;
      const joined = n > 0 && known(series[n - 1]) && ages[n - 1] - ages[n] <= HOLE_SECONDS;
      if (!joined) close();
      const at = `${x(ages[n])} ${y(value)}`;
      path += (joined ? "L" : "M") + at + (joined ? "" : "h.1");
      area += (joined ? "L" : "M") + at;
      if (!joined) begun = x(ages[n]);
      last = n;
    });
    close();
    if (line === 0) nodes.push(draw("path", { class: "area", d: area }));
    nodes.push(draw("path", { class: line === 0 ? "" : chart.id === "rate" ? "refused" : "second", d: path }));
  });
  chart.svg.replaceChildren(...nodes);
  const last = values.length ? text(chart.unit(Math.max(...values))) : "nothing measured";
  chart.svg.setAttribute("aria-label", `${chart.name} over the last ${text(duration(span))}; highest: ${last}`);
  say(chart.top, values.length ? text(chart.unit(top)) : "");
  chart.empty.hidden = values.length > 0;
}

// Shows the sample under the pointer.
function point(chart, plot, event) {
  const box = plot.getBoundingClientRect(), ages = chart.samples?.age_seconds ?? [];
  const age = (1 - (event.clientX - box.left) / box.width) * chart.span;
  let near = -1;
  ages.forEach((each, n) => { if (near < 0 || Math.abs(each - age) < Math.abs(ages[near] - age)) near = n; });
  chart.cursor.hidden = chart.tip.hidden = near < 0 || Math.abs(ages[near] - age) > HOLE_SECONDS;
  if (chart.tip.hidden) return;
  const said = chart.lines.filter(([, column], line) => line === 0 || known(chart.samples[column][near])).map(([name, column]) => {
    const value = chart.samples[column][near];
    return `${name} ${known(value) ? text(chart.unit(value)) : "not known"}`;
  });
  if (chart.samples.outage[near]) said.push("outage");
  say(chart.tip, `${text(duration(Math.round(ages[near])))} ago: ${said.join(", ")}`);
  const at = box.width * (1 - ages[near] / chart.span);
  chart.cursor.style.left = `${at}px`;
  const wide = chart.tip.offsetWidth;
  chart.tip.style.left = `${Math.max(0, Math.min(box.width - wide, at < box.width / 2 ? at + 8 : at - wide - 8))}px`;
}

function big(chart, value) {
  const [said, unit] = known(value) ? chart.unit(value) : ["–", ""];
  const key = said + "|" + unit;
  if (chart.shown === key) return;
  chart.shown = key;
  chart.value.replaceChildren(said, make("span", "unit", unit ? (unit === "/s" ? unit : " " + unit) : ""));
}

function charts(status, recent) {
  const { samples } = recent, [rate, lag, latency, backlog] = CHARTS, totals = status.events;
  const last = (column) => samples[column].at(-1);
  // What is measured only while events flow keeps its last value for a minute.
  const lately = (column) => samples[column].findLast((value, n) => known(value) && samples.age_seconds[n] <= 60);
  // Soon after the start there is little to show: the charts begin with two minutes and grow.
  const oldest = Math.ceil((samples.age_seconds[0] ?? 0) / 60) * 60;
  const span = Math.min(recent.window_seconds, Math.max(120, oldest));
  for (const chart of CHARTS) drawChart(chart, samples, span);
  big(rate, last("published_per_second"));
  say(rate.beside, `${events(totals.published)} since the start, ${events(totals.failed, "rejection", "rejections")}`);
  const counted = recent.counted_seconds_ago;
  big(lag, known(counted) ? totals.lag_seconds : null);
  big(backlog, known(counted) ? totals.pending : null);
  const old = !recent.counted && known(counted) ? `PostgreSQL does not tell: as of ${text(duration(counted))} ago` : "";
  say(lag.beside, old || (known(counted) ? `counted ${text(duration(Math.round(counted)))} ago` : "not counted yet"));
  lag.beside.classList.toggle("warn", old !== "");
  say(backlog.beside, known(counted) ? `${plain(totals.retrying)} in retry, ${events(totals.dead, "dead letter", "dead letters")}` : "not counted yet");
  big(latency, lately("claim_p50_seconds"));
  const [p99, publish, settle] = ["claim_p99_seconds", "publish_mean_seconds", "settle_mean_seconds"].map(lately);
  const ways = [["99 % within", p99], ["publish", publish], ["settle", settle]].filter(([, value]) => known(value));
  say(latency.beside, ways.length ? ways.map(([name, value]) => `${name} ${text(duration(value))}`).join(" · ") : "no claim in the last minute");
}

const ICONS = { ok: "%231a7f4b", warn: "%23c77700", bad: "%23c5221f" };
let shownState = "";
function state(kind, verdict, since, reasons, comfort) {
  $("state").hidden = false;
  $("state").className = "state " + kind;
  say($("verdict"), verdict);
  say($("since"), since);
  say($("comfort"), comfort);
  list($("reasons"), reasons.map((reason) => [reason, ""]));
  document.title = `${kind === "ok" ? "" : verdict + " – "}pg-outbox ${$("instance").textContent}`;
  if (shownState === kind) return;
  shownState = kind;
  $("icon").href = `data:image/svg+xml,<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="${ICONS[kind]}"/></svg>`;
}

function judge(status, recent) {
  const { live, ready, outage_seconds: outage } = status, since = known(outage) ? `for ${text(duration(outage))}` : "";
  // What is said beside the verdict need not be said again.
  const all = (ready.reasons ?? []).filter((reason) => !reason.startsWith("draining: "));
  const cause = (reason) => reason.slice(reason.indexOf(": ") + 2);
  const outages = all.filter((reason) => reason.startsWith("outage for ")), rest = all.filter((reason) => !outages.includes(reason));
  const others = [...rest, ...outages.map(cause).filter((said) => !rest.some((reason) => cause(reason) === said))];
  if (live.status !== "ok") return state("bad", "Stuck", "", live.reasons, "Threads make no progress. The watchdog restarts the service.");
  if (status.draining) return state("warn", "Stopping", "", others, "What is in flight is finished; the rest is for the next one.");
  if (known(outage)) return state("bad", "Outage", since, others, "NATS cannot take events now. No attempt is charged to any event, and it goes on by itself when NATS answers.");
  if (ready.status !== "ok") return state("bad", "Not ready", "", others, "Events wait; nothing is lost.");
  const rate = recent.samples.published_per_second.at(-1);
  return state("ok", rate > 0 ? "Publishing" : "Ready", rate > 0 ? "" : "nothing to publish just now", [], "");
}

// Lists and tables keep their nodes, so that what is selected stays selected.
function list(parent, entries) {
  while (parent.children.length > entries.length) parent.lastChild.remove();
  entries.forEach(([said, className], n) => {
    const item = parent.children[n] ?? parent.appendChild(make("li"));
    say(item, said);
    if (item.className !== className) item.className = className;
  });
}

function table(name, rows, total) {
  const element = $(name), body = element.tBodies[0];
  const labels = [...element.tHead.rows[0].cells].map((cell) => [cell.textContent, cell.className]);
  element.hidden = rows.length === 0;
  $(name + "-none").hidden = rows.length > 0 || total > 0;
  say($(name + "-count"), total > 0 ? whole.format(total) : "");
  while (body.rows.length > rows.length) body.lastChild.remove();
  rows.forEach((row, n) => {
    const line = body.rows[n] ?? body.insertRow();
    row.forEach(([said, title], column) => {
      let cell = line.cells[column];
      if (!cell) {
        cell = line.insertCell();
        cell.dataset.label = labels[column][0];
        cell.className = labels[column][1];
        cell.append(make("span"));
      }
      say(cell.firstChild, said);
      if (title && cell.title !== title) cell.title = title;
    });
  });
}

function waiting(status, recent) {
  const from = (ms) => (ms - recent.now_ms) / 1000;
  const when = (ms) => new Date(ms).toLocaleString();
  const due = (ms) => (from(ms) > 0 ? `in ${text(duration(Math.ceil(from(ms))))}` : "due");
  const ago = (ms) => (from(ms) > -1 ? "just now" : `${text(duration(Math.floor(-from(ms))))} ago`);
  const { retries, dead_letters: letters } = recent, { retrying, dead } = status.events;
  table("retries", retries.map((retry) => [
    [retry.topic], [`${retry.seq}`], [`${retry.attempts}`], [due(retry.next_attempt_at_ms), when(retry.next_attempt_at_ms)], [retry.reason],
  ]), Math.max(retrying, retries.length));
  say($("retries-more"), retrying > retries.length && retries.length ? `The first ${retries.length} of ${plain(retrying)}. Later events of their keys wait for them.` : "");
  table("letters", letters.map((letter) => [
    [letter.topic, letter.id], [`${letter.seq}`], [`${letter.attempts}`], [ago(letter.dead_at_ms), when(letter.dead_at_ms)], [letter.reason],
  ]), Math.max(dead, letters.length));
  say($("letters-more"), dead > letters.length && letters.length ? `The newest ${letters.length} of ${plain(dead)}.` : "");
}

function show({ status, recent }) {
  say($("instance"), status.instance);
  say($("about"), `version ${status.version}, up for ${text(duration(status.uptime_seconds))}`);
  charts(status, recent);
  judge(status, recent);
  list($("parts"), status.parts.map(({ name, state }) => (state === "ok" ? [name, "ok"] : [`${name}: ${state}`, "bad"])));
  list($("threads"), status.threads.map(({ name, state, busy_seconds: busy }) => [
    `${name} ${state}${known(busy) && busy >= 1 ? `, last progress ${text(duration(busy))} ago` : ""}`,
    live(status, name) ? "" : "bad",
  ]));
  waiting(status, recent);
  say($("updated"), `as of ${new Date().toLocaleTimeString()}`);
  document.body.className = "";
}

const live = (status, thread) => !(status.live.reasons ?? []).some((reason) => reason.startsWith(thread + ": "));

let heard = Date.now(), timer, asking = false;
const ask = async (path) => {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(GIVE_UP_MS) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
};
async function poll() {
  clearTimeout(timer);
  if (document.hidden || asking) return;
  asking = true;
  try {
    const [status, recent] = await Promise.all([ask("status"), ask("recent")]);
    show({ status, recent });
    heard = Date.now();
  } catch {
    document.body.className = "old";
    state("bad", "No answer", `since ${new Date(heard).toLocaleTimeString()}`, [], "This instance does not answer; what is below is from before. Others may go on with its work.");
  } finally {
    asking = false;
    timer = setTimeout(poll, POLL_MS);
  }
}
document.addEventListener("visibilitychange", poll);
show(JSON.parse($("first").textContent));
timer = setTimeout(poll, POLL_MS);
