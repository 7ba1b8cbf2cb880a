// Shows values as text. Whatever comes from the API enters the page through `setText`, never as HTML.

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

export const byId = (id) => document.getElementById(id);

// Changes the text of an element only when it differs, so that a screen reader is not disturbed.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function element(kind, text = "", className = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function bytes(count) {
  let power = 0;
  let rest = Math.max(0, Number(count) || 0);
  while (rest >= 999.95 && power < UNITS.length - 1) {
    rest /= 1000;
    power += 1;
  }
  return `${power ? rest.toFixed(1) : rest} ${UNITS[power]}`;
}

export function duration(seconds) {
  const all = Math.max(0, Math.round(Number(seconds) || 0));
  const [hours, minutes] = [Math.floor(all / 3600), Math.floor(all / 60) % 60];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${all % 60} s` : `${all} s`;
}

// The time of day; with the date when it is not today.
export function clock(iso) {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return "";
  const time = at.toLocaleTimeString();
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString()} ${time}`;
}
