// Compiles src/ into page/, which is committed: who installs the wheel has no node.
// Libraries of others go into page/vendor.js, with their licences in page/licences.txt.
import { build } from "esbuild";
import { readFileSync, writeFileSync } from "node:fs";

const libraries = ["@huggingface/tokenizers", "@huggingface/jinja"];
const common = { bundle: true, format: "esm", target: "es2022", outdir: "page", charset: "utf8" };
const outside = {
  name: "outside",
  setup({ onResolve }) {
    const at = (path) => () => ({ path, external: true });
    for (const name of libraries) onResolve({ filter: new RegExp(`^${name}$`) }, at("./vendor.js"));
    onResolve({ filter: /^\.\/runtime$/ }, at("./runtime.js"));
  },
};
await build({
  ...common,
  minify: true,
  stdin: {
    contents: `export { Tokenizer } from "${libraries[0]}"; export { Template } from "${libraries[1]}";`,
    resolveDir: ".",
  },
  outdir: undefined,
  outfile: "page/vendor.js",
  banner: { js: "// Libraries of others; see licences.txt." },
});
await build({ ...common, entryPoints: ["src/runtime.ts", "src/worker.ts", "src/page.ts"], plugins: [outside] });

const licences = libraries.map((name) => {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  return `${name} ${version} (${license})\n\n${readFileSync(`${folder}/LICENSE`, "utf8")}`;
});
writeFileSync("page/licences.txt", licences.join(`\n${"-".repeat(78)}\n\n`));
