// Forms and links work without this file. It replaces parts of the page instead of loading a whole
// one, lets the list follow the slider, and searches while a title is typed.
"use strict";

const byId = (id) => document.getElementById(id);
const isField = (event, id) => event.target.id === id;

async function fetchPage(address, options) {
  const response = await fetch(address, options);
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  if (!response.ok && !page.getElementById("main")) throw new Error(page.body.textContent);
  return page;
}

function replace(page, id) {
  const [old, now] = [byId(id), page.getElementById(id)];
  if (old && now) old.replaceWith(now);
}

function say(text) {
  byId("said").textContent = text;
}

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") say(`That did not work: ${error.message}`);
  }
}

// The newest request of a kind ends the one before it.
const running = new Map();
function newest(kind) {
  running.get(kind)?.abort();
  const controller = new AbortController();
  running.set(kind, controller);
  return { signal: controller.signal };
}

const timers = new Map();
function later(kind, milliseconds, work) {
  clearTimeout(timers.get(kind));
  timers.set(kind, setTimeout(() => attempt(work), milliseconds));
}

// The list follows the slider: one request at a time, the newest weight next.
let [wanted, following, changes] = [null, false, 0];
async function follow(weight) {
  wanted = weight;
  if (following) return;
  following = true;
  try {
    while (wanted !== null) {
      const [next, before] = [wanted, changes];
      wanted = null;
      const page = await fetchPage(`/list?weight=${next}`);
      if (before === changes) replace(page, "list");
    }
  } finally {
    following = false;
  }
}

// Where the focus was, so that it is not lost when the part of the page is replaced.
function placeOf(form) {
  const row = form.closest("li");
  if (!row) return null;
  const rows = [...row.parentElement.children];
  return { list: row.parentElement.id, index: rows.indexOf(row) };
}

function focusAt(place, label) {
  const rows = place && place.list && byId(place.list) ? byId(place.list).children : [];
  const heading = rows[Math.min(place?.index ?? 0, rows.length - 1)]?.querySelector("h2");
  const button = [...document.querySelectorAll("main button")].find(
    (one) => (one.ariaLabel ?? one.textContent) === label,
  );
  const target = heading ?? button ?? byId("main");
  target.focus({ preventScroll: target.id === "main" });
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.id === "mix") return event.preventDefault();
  if (!("swap" in form.dataset)) return;
  event.preventDefault();
  const [place, button] = [placeOf(form), event.submitter];
  const label = button?.ariaLabel ?? button?.textContent;
  attempt(async () => {
    [wanted, changes] = [null, changes + 1];
    const body = new URLSearchParams(new FormData(form, button));
    const page = await fetchPage(form.action, { method: "POST", body });
    replace(page, "main");
    document.title = page.title;
    say(page.getElementById("said").textContent);
    focusAt(place, label);
  });
});

document.addEventListener("input", (event) => {
  if (isField(event, "weight")) {
    const weight = event.target.value;
    byId("shown").textContent = Number(weight).toFixed(2);
    attempt(() => follow(weight));
  }
  if (isField(event, "q")) {
    const query = encodeURIComponent(event.target.value);
    later("search", 150, async () => {
      const page = await fetchPage(`/search?q=${query}`, newest("search"));
      replace(page, "found");
      say(page.querySelector("#found .hint")?.textContent ?? "");
    });
  }
});

document.addEventListener("change", (event) => {
  if (!isField(event, "weight")) return;
  const body = new URLSearchParams({ weight: event.target.value });
  later("keep", 300, async () => {
    const answer = await fetch("/weight", { method: "POST", body, redirect: "manual" });
    if (answer.type !== "opaqueredirect") throw new Error("the weight was not kept");
    say(`Your own part counts ${body.get("weight")}. The list is in its new order.`);
  });
});

document.addEventListener(
  "toggle",
  (event) => {
    const [details, address] = [event.target, event.target.dataset.why];
    if (!address || !details.open || "asked" in details.dataset) return;
    details.dataset.asked = "";
    const part = details.querySelector(".reasons");
    part.setAttribute("role", "status");
    part.textContent = "Leaving each title out once…";
    attempt(async () => {
      const page = await fetchPage(address, {});
      const reasons = page.getElementById("reasons") ?? page.getElementById("main");
      part.replaceChildren(...reasons.childNodes);
    });
  },
  true,
);
