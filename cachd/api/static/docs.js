// The page of the API: shows the daemon's OpenAPI document.

import { ask, setToken } from "/assets/api.js";
import { byId, element, setText } from "/assets/text.js";

const SCHEMAS = "#/components/schemas/";

async function show() {
  try {
    const described = await ask("GET", "/openapi.json");
    setText(byId("said"), "");
    setText(byId("version"), described.info.version);
    byId("calls").replaceChildren(...groups(described));
    const schemas = Object.entries(described.components.schemas);
    byId("schemas").replaceChildren(...schemas.map(([name, schema]) => schemaOf(name, schema)));
    if (location.hash) byId(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  } catch (error) {
    byId("said").className = "said error";
    setText(byId("said"), error.text ?? String(error));
  }
}

function groups(described) {
  const byTag = new Map();
  for (const [path, calls] of Object.entries(described.paths)) {
    for (const [method, call] of Object.entries(calls)) {
      const tag = call.tags?.[0] ?? "other";
      byTag.set(tag, [...(byTag.get(tag) ?? []), callOf(method, path, call)]);
    }
  }
  return [...byTag].map(([tag, calls]) => {
    const section = element("section");
    section.append(element("h2", tag), ...calls);
    return section;
  });
}

function callOf(method, path, call) {
  const details = element("details");
  const summary = element("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("code", path));
  details.append(summary, prose(call.description ?? ""));
  details.append(element("p", call["x-role"] ? `Needs the role ${call["x-role"]}.` : "Needs no token.", "small"));
  const parameters = (call.parameters ?? []).map((each) => [each.name, kind(each.schema), each.description, each.required]);
  if (parameters.length) details.append(element("h4", "Parameters"), meanings(parameters));
  const body = call.requestBody?.content?.["application/json"]?.schema;
  if (body) details.append(element("h4", "Body"), line([kind(body)]));
  const answers = Object.entries(call.responses).map(([status, answer]) => {
    const [content] = Object.values(answer.content ?? {});
    return [status, content?.schema ? kind(content.schema) : [], answer.description];
  });
  details.append(element("h4", "Answers"), meanings(answers));
  return details;
}

function schemaOf(name, schema) {
  const details = element("details");
  const summary = element("summary");
  details.id = name;
  summary.append(element("code", name));
  details.append(summary, prose(schema.description ?? ""));
  const needed = new Set(schema.required ?? []);
  const fields = Object.entries(schema.properties ?? {});
  if (fields.length) details.append(meanings(fields.map(([key, of]) => [key, kind(of), of.description, needed.has(key)])));
  if (schema.enum) details.append(line([schema.enum.join(", ")]));
  return details;
}

// A list of names, each with its type and its meaning.
function meanings(rows) {
  const made = element("dl", "", "meanings");
  for (const [name, type, meaning, isNeeded] of rows) {
    const term = element("dt");
    term.append(element("code", name), " ", ...[type].flat(), isNeeded ? " (always)" : "");
    const description = element("dd");
    description.append(prose(meaning ?? ""));
    made.append(term, description);
  }
  return made;
}

function line(parts) {
  const made = element("p");
  made.append(...parts.flat());
  return made;
}

// A type as text and links to schemas.
function kind(schema) {
  if (schema.$ref) return [link(schema.$ref.replace(SCHEMAS, ""))];
  const several = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (several) return several.flatMap((each, index) => (index ? [" or ", ...kind(each)] : kind(each)));
  if (schema.enum) return [schema.enum.map(String).join(", ")];
  if (schema.const !== undefined) return [String(schema.const)];
  if (schema.type === "array") return ["list of ", ...kind(schema.items ?? {})];
  return [[schema.type, schema.format].filter(Boolean).join(", ") || "any value"];
}

function link(name) {
  const made = element("a", name);
  made.href = `#${encodeURIComponent(name)}`;
  made.addEventListener("click", () => {
    const target = byId(name);
    if (target) target.open = true;
  });
  return made;
}

// A paragraph in which `words` are code.
function prose(text) {
  const made = element("p");
  made.append(...text.split("`").map((part, index) => (index % 2 ? element("code", part) : part)));
  return made;
}

byId("token-form").addEventListener("submit", (event) => event.preventDefault());
byId("token").addEventListener("change", () => {
  setToken(byId("token").value);
  show();
});
setToken(byId("token").value);
show();
