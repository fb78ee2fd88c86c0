// A page about something that goes on: it reloads itself, keeps the scroll position and what is unfolded, and says how
// old it is. #state has when it was written, after how many seconds to reload (0: never) and when that is too old (0: never).
(() => {
  "use strict";
  const { written, every, patience } = document.getElementById("state").dataset;
  const key = "sslvit " + location.pathname;
  const details = () => [...document.querySelectorAll("details")];
  const title = (one) => one.querySelector("summary").textContent;

  history.scrollRestoration = "manual";
  try {
    const kept = JSON.parse(sessionStorage.getItem(key)) || {};
    for (const one of details()) one.open = (kept.open || {})[title(one)] ?? one.open;
    requestAnimationFrame(() => scrollTo(kept.x || 0, kept.y || 0));
  } catch { /* no storage, so the page begins at its top */ }
  addEventListener("pagehide", () => {
    const open = Object.fromEntries(details().map((one) => [title(one), one.open]));
    try { sessionStorage.setItem(key, JSON.stringify({ x: scrollX, y: scrollY, open })); } catch { /* as above */ }
  });

  const words = (seconds) => seconds < 90 ? `${Math.max(0, Math.round(seconds))} s`
    : seconds < 5400 ? `${Math.round(seconds / 60)} min` : seconds < 172800 ? `${Math.round(seconds / 3600)} h`
    : `${Math.round(seconds / 86400)} days`;
  function tell() {
    const age = Date.now() / 1000 - written;
    document.getElementById("age").textContent = ` (${words(age)} ago)`;
    const stale = document.getElementById("stale");
    stale.hidden = !(every > 0 && patience > 0 && age > patience);
    stale.querySelector("b").textContent = words(age);
  }
  const time = document.querySelector("#state time");
  time.textContent = new Date(written * 1000).toLocaleString();
  tell();
  setInterval(tell, 1000);

  let due = false;
  function reload() {  // not while the reader selects text, chooses or types
    if (due && !document.hidden && getSelection().isCollapsed && !document.activeElement.matches("select, [type=search]"))
      location.reload();
  }
  if (every > 0) {
    setTimeout(() => { due = true; reload(); setInterval(reload, 2000); }, every * 1000);
    document.addEventListener("visibilitychange", reload);
  }
})();
