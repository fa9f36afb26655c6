"use strict";
// The text by compressions: which heads still hold each token. The page is whole without this file.
(() => {
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("data").textContent);
  const root = document.documentElement;
  const spans = [...at("tokens").children];
  const kinds = spans.map((span) => (span.className.match(/\b[mf]\b/g) || []).join(" "));
  const squares = [...document.querySelectorAll(".heads rect")];
  const radios = [...document.querySelectorAll("input[name=policy]")];
  const figures = [...document.querySelectorAll(".survivals figure")];
  const slider = at("step");
  const heads = data.heads.reduce((sum, n) => sum + n, 0);
  const number = (n) => n.toLocaleString("en");
  const state = { policy: 0, step: 0, token: -1 };
  let timer = 0;
  let turn = 0; // of what was asked for last: an older answer that comes late is dropped

  // Which compression dropped each token, token by token and head by head; 0 is none.
  const unpacked = new Map();
  async function gone(policy) {
    if (!unpacked.has(policy)) {
      const packed = Uint8Array.from(atob(policy.gone), (c) => c.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
      const buffer = await new Response(stream).arrayBuffer();
      unpacked.set(policy, policy.wide === 1 ? new Uint8Array(buffer) : new Uint16Array(buffer));
    }
    return unpacked.get(policy);
  }

  const last = (policy) => policy.read.length + 1;
  const seen = (policy, step) =>
    step > policy.read.length ? spans.length : policy.read[Math.max(step, 1) - 1];

  function holds(lives, step, token, head) {
    const when = lives[token * heads + head];
    return when === 0 || when > step;
  }

  function told(policy, step, any, total) {
    const of = policy.read.length;
    const read = seen(policy, step);
    const when =
      step > of ? `at the end of the text, after ${number(of)} compressions`
      : step === 0 ? "before the first compression"
      : `after compression ${number(step)} of ${number(of)}`;
    return (
      `${when}: ${number(read)} tokens read, ${number(Math.round(total / heads))} held by each head, ` +
      `${number(any)} (${Math.round((100 * any) / read)}%) by any`
    );
  }

  async function show() {
    const mine = ++turn;
    const policy = data.policies[state.policy];
    const step = (state.step = Math.min(Math.max(state.step, 0), last(policy)));
    const lives = await gone(policy);
    if (mine !== turn) return;
    const read = seen(policy, step);
    let any = 0;
    let total = 0;
    spans.forEach((span, token) => {
      let count = 0;
      if (token < read) for (let h = 0; h < heads; h++) if (holds(lives, step, token, h)) count++;
      any += count > 0 ? 1 : 0;
      total += count;
      const shade = token < read ? `c${data.levels[count]}` : "n";
      const name = [shade, kinds[token], token === state.token ? "on" : ""].filter(Boolean).join(" ");
      if (span.className !== name) span.className = name;
    });
    slider.max = last(policy);
    slider.value = step;
    at("now").textContent = told(policy, step, any, total);
    slider.setAttribute("aria-valuetext", at("now").textContent);
    radios.forEach((radio, i) => (radio.checked = i === state.policy));
    figures.forEach((figure, i) => {
      figure.classList.toggle("chosen", i === state.policy);
      const now = figure.querySelector(".now");
      now.setAttribute("y", data.map.top + now.getAttribute("height") * step);
    });
    inspect(policy, lives, step, state.token);
    root.dataset.shown = `${policy.label}/${step}`;
  }

  function inspect(policy, lives, step, token) {
    if (token < 0) return;
    const read = token < seen(policy, step);
    const layers = [];
    let all = 0;
    let head = 0;
    data.heads.forEach((n, layer) => {
      let held = 0;
      for (let h = 0; h < n; h++, head++) {
        const on = read && holds(lives, step, token, head);
        squares[head].setAttribute("class", on ? "on" : "");
        held += on ? 1 : 0;
      }
      if (held) layers.push([layer, held]);
      all += held;
    });
    const word = document.createElement("b");
    word.textContent = `“${spans[token].textContent.replace(/\n/g, "↵")}”`;
    const where = layers.length ? `, in ${number(layers.length)} of ${data.heads.length} layers` : "";
    const what = read ? `held by ${all} of ${heads} heads${where}` : "not read yet";
    at("one").replaceChildren(word, ` token ${number(token)}: ${what}`);
    at("one").dataset.layers = layers.map(([layer, n]) => `${layer}:${n}`).join(" ");
  }

  function change(wanted) {
    Object.assign(state, wanted);
    state.step = Math.min(Math.max(state.step, 0), last(data.policies[state.policy]));
    const hash = new URLSearchParams({ policy: data.policies[state.policy].label, step: state.step });
    if (state.token >= 0) hash.set("token", state.token);
    history.replaceState(null, "", `#${hash}`);
    return show();
  }

  // "#policy=keydiff&step=3&token=120": a state of the page as an address.
  function follow() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const label = hash.get("policy");
    const policy = label === null ? state.policy : data.policies.findIndex((p) => p.label === label);
    const token = hash.has("token") ? Number(hash.get("token")) : state.token;
    state.policy = policy < 0 ? 0 : policy;
    state.step = hash.has("step") ? Number(hash.get("step")) | 0 : state.step;
    state.token = Number.isInteger(token) && token < spans.length ? token : -1;
    show();
  }

  function play() {
    const on = !timer;
    clearInterval(timer);
    timer = 0;
    if (on) {
      const end = () => last(data.policies[state.policy]);
      if (state.step >= end()) change({ step: 0 });
      timer = setInterval(() => (state.step < end() ? change({ step: state.step + 1 }) : play()), 700);
    }
    at("play").textContent = on ? "❚❚" : "▶";
    at("play").setAttribute("aria-label", on ? "Pause" : "Play the compressions");
  }

  slider.addEventListener("input", () => change({ step: Number(slider.value) }));
  at("play").addEventListener("click", play);
  radios.forEach((radio, i) => radio.addEventListener("change", () => change({ policy: i })));
  figures.forEach((figure, i) =>
    figure.querySelector("svg").addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      const top = (data.map.top / data.map.height) * box.height;
      const share = (event.clientY - box.top - top) / (box.height - top);
      const token = Math.floor(((event.clientX - box.left) / box.width) * spans.length);
      change({ policy: i, step: Math.floor(share * (last(data.policies[i]) + 1)), token });
      spans[token]?.scrollIntoView({ block: "center" });
    }),
  );

  const marked = spans.flatMap((span, i) =>
    kinds[i].includes("m") && !(kinds[i - 1] || "").includes("m") ? [i] : [],
  );
  at("mark")?.addEventListener("click", () => {
    const token = marked.find((i) => i > state.token) ?? marked[0];
    change({ token });
    spans[token].scrollIntoView({ block: "center" });
  });

  let pinned = false; // by a tap or a click: pointing at others does not change it
  at("tokens").addEventListener("pointerover", async (event) => {
    const token = spans.indexOf(event.target);
    if (token < 0 || pinned) return;
    const policy = data.policies[state.policy];
    const lives = await gone(policy);
    spans[state.token]?.classList.remove("on");
    spans[token].classList.add("on");
    state.token = token;
    inspect(policy, lives, state.step, token);
  });
  at("tokens").addEventListener("click", (event) => {
    const token = spans.indexOf(event.target);
    if (token < 0) return;
    pinned = !(pinned && state.token === token);
    change({ token });
  });
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const box = at("words").getBoundingClientRect();
    const typing = /^(INPUT|SUMMARY)$/.test(event.target.tagName) || event.target.closest(".wide");
    if (!by || typing || event.ctrlKey || event.metaKey || event.altKey || box.top > innerHeight) return;
    event.preventDefault();
    const token = Math.min(Math.max(state.token + by, 0), spans.length - 1);
    change(event.shiftKey ? { token } : { step: state.step + by });
  });
  addEventListener("hashchange", follow);

  if (typeof DecompressionStream === "undefined") return; // an older browser keeps the plain page
  root.classList.add("js");
  state.step = last(data.policies[0]);
  state.token = marked[0] ?? -1;
  follow();
})();
