// Answers of an explorer's module: `node compute.mjs <name> <folder>` reads { data, states }, writes a list of answers.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const module = await import(pathToFileURL(`${process.argv[3]}/${process.argv[2]}.js`));
const { data, states } = JSON.parse(readFileSync(0, "utf8"));
const answers = states.map((state) => {
  try {
    return module.compute(data, state);
  } catch (error) {
    return { error: error.message };
  }
});
process.stdout.write(JSON.stringify(answers));
