// The bars of the disk and of the memory.

import { bytes, byId, element, setText } from "/assets/text.js";

export function showDisk(capacity) {
  const { total_bytes: total, free_bytes: free, reserved_bytes: reserved } = capacity;
  const models = Math.min(capacity.used_bytes, total - free);
  const other = total - free - models;
  stack(byId("disk"), [["models", models], ["other", other], ["reserved", Math.min(reserved, free)]], total);
  const texts = [
    `${bytes(free)} of ${bytes(total)} free`,
    `models ${bytes(models)}`,
    `other files ${bytes(other)}`,
    reserved ? `reserved for pulls ${bytes(reserved)}` : "",
    capacity.limit_bytes === null ? "" : `limit ${bytes(capacity.limit_bytes)}`,
    capacity.over_bytes ? `${bytes(capacity.over_bytes)} too many` : `available ${bytes(capacity.available_bytes)}`,
  ];
  say("disk", texts);
  byId("space").hidden = false;
}

export function showMemory(models) {
  const ready = models.filter((model) => model.ready);
  const all = ready.reduce((sum, model) => sum + model.ready.bytes, 0);
  const resident = ready.reduce((sum, model) => sum + model.resident_bytes, 0);
  stack(byId("memory"), [["models", Math.min(resident, all)]], all);
  say("memory", [`${bytes(resident)} of ${bytes(all)} of the ready models are in the page cache`]);
}

function say(id, texts) {
  const text = texts.filter(Boolean).join(" · ");
  setText(byId(`${id}-text`), text);
  byId(id).setAttribute("aria-label", text);
}

// The segments of a bar. The policy of the page allows no style in HTML; the one that is set here is data.
function stack(bar, segments, total) {
  if (!bar.children.length) bar.append(...segments.map(([kind]) => element("span", "", kind)), element("span"));
  const rest = Math.max(total - segments.reduce((sum, [, size]) => sum + size, 0), total ? 0 : 1);
  [...segments, ["free", rest]].forEach(([, size], index) => {
    bar.children[index].style.flexGrow = String(size / (total || 1));
  });
}
