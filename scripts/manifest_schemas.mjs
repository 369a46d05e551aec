// Checks custom resources against the validators of @kubernetes-models: documents as a JSON list on standard input, a
// JSON list of {index, problems} on standard output; problems is null where no package knows the kind.
//   node scripts/manifest_schemas.mjs FOLDER_WITH_NODE_MODULES < documents.json
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const modules = join(process.argv[2], "node_modules", "@kubernetes-models");
const packages = readdirSync(modules);
const documents = JSON.parse(readFileSync(0, "utf8"));

// The validators take unknown fields. They ask an object for each field that they know, so a field of an object that was
// asked for fields, but never for this one, is unknown.
function watch(value, path, seen) {
  if (value === null || typeof value !== "object") return value;
  const asked = new Set();
  const children = new Map();
  if (!Array.isArray(value)) seen.push({ value, path, asked });
  return new Proxy(value, {
    get(target, key) {
      if (typeof key === "symbol") return target[key];
      asked.add(key);
      if (!children.has(key)) children.set(key, watch(target[key], Array.isArray(value) ? `${path}[${key}]` : `${path}.${key}`, seen));
      return children.get(key);
    },
  });
}

const answers = [];
for (const [index, document] of documents.entries()) {
  const [group, version] = document.apiVersion.split("/");
  const file = packages.map((name) => join(modules, name, group, version, `${document.kind}.js`)).find(existsSync);
  if (!file) {
    answers.push({ index, problems: null });
    continue;
  }
  const model = (await import(pathToFileURL(file)))[document.kind];
  const seen = [];
  const problems = [];
  const object = new model(document);
  object.spec = watch(document.spec ?? {}, "spec", seen); // a constructor would copy it
  try {
    object.validate();
  } catch (error) {
    problems.push(error.message);
  }
  for (const { value, path, asked } of seen) {
    if (asked.size === 0) continue;
    for (const key of Object.keys(value)) if (!asked.has(key)) problems.push(`${path}.${key}: unknown field`);
  }
  answers.push({ index, problems });
}
console.log(JSON.stringify(answers));
