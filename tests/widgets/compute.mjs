// Answers of an explorer's module: `node compute.mjs <name>` reads { data, states }, writes a list of answers.
import { readFileSync } from "node:fs";

const module = await import(new URL(`../../pxp/widgets/${process.argv[2]}.js`, import.meta.url));
const { data, states } = JSON.parse(readFileSync(0, "utf8"));
const answers = states.map((state) => {
  try {
    return module.compute(data, state);
  } catch (error) {
    return { error: error.message };
  }
});
process.stdout.write(JSON.stringify(answers));
