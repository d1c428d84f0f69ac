"use strict";

// In a notebook's frame (srcdoc) a link to a section would load the notebook into the frame.
if (location.protocol === "about:") {
  addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (!link) return;
    event.preventDefault();
    document.getElementById(link.getAttribute("href").slice(1)).scrollIntoView();
  });
}

// Print folded sections too.
const folded = [];
addEventListener("beforeprint", () => {
  folded.push(...document.querySelectorAll("details:not([open])"));
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of folded.splice(0)) each.open = false;
});

const find = (id) => document.getElementById(id);

// A page opened from a disk may use the clipboard; a frame without that permission needs the older command.
const copy = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    const place = find("enlarged").open ? find("enlarged") : document.body;
    const focused = document.activeElement;
    area.value = text;
    place.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return isCopied;
  }
};

// Pictures and figures, enlarged: the arrow keys go through the pictures of a section, Esc closes.
const dialog = find("enlarged");
const enlarged = { opener: null, pictures: [], place: 0 };
const showEnlarged = (content, text, path) => {
  find("enlarged-content").replaceChildren(content);
  find("enlarged-text").textContent = text;
  find("enlarged-copy").hidden = !path;
  for (const id of ["enlarged-before", "enlarged-after"]) find(id).hidden = enlarged.pictures.length < 2;
  if (!dialog.open) dialog.showModal();
};
const showPicture = (place) => {
  enlarged.place = (place + enlarged.pictures.length) % enlarged.pictures.length;
  const button = enlarged.pictures[enlarged.place];
  const { path } = button.dataset;
  const image = button.firstElementChild.cloneNode();
  const { alt } = image;
  for (const name of ["title", "width", "height"]) image.removeAttribute(name);
  showEnlarged(image, !path || alt.includes(path) ? alt : `${alt}: ${path}`, path);
};
const showFigure = (figure) => {
  enlarged.pictures = [];
  showEnlarged(figure.querySelector("svg").cloneNode(true), figure.querySelector("figcaption").firstChild.textContent, "");
};
addEventListener("click", (event) => {
  const opener = event.target.closest?.("button.picture, button.enlarge");
  if (!opener) return;
  enlarged.opener = opener;
  if (opener.matches(".enlarge")) {
    showFigure(opener.closest("figure"));
  } else {
    enlarged.pictures = [...opener.closest("section").querySelectorAll("button.picture")].filter((each) => each.checkVisibility());
    showPicture(enlarged.pictures.indexOf(opener));
  }
});
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && enlarged.pictures.length) showPicture(enlarged.place + step);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
dialog.addEventListener("close", () => enlarged.opener?.focus());
find("enlarged-before").addEventListener("click", () => showPicture(enlarged.place - 1));
find("enlarged-after").addEventListener("click", () => showPicture(enlarged.place + 1));
find("enlarged-close").addEventListener("click", () => dialog.close());
find("enlarged-copy").addEventListener("click", async () => {
  const isCopied = await copy(enlarged.pictures[enlarged.place].dataset.path);
  find("enlarged-text").textContent = isCopied ? "The path is copied." : "The browser does not let this page copy.";
});

// A table of labels: ./ before a path means the same file, and keeps a spreadsheet from reading it as a formula.
const FORMULA = /^'*[=+\-@\t\r\n]/;
const quote = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const formatRow = (path, label) =>
  `${quote(FORMULA.test(path) ? `./${path}` : path)},${quote(FORMULA.test(label) ? `'${label}` : label)}\r\n`;

// The maps. Paths and labels are strangers' text: they reach the page as text nodes and attributes, never as HTML.
const showMaps = async () => {
  const MAX_PICTURES = 24;
  const data = JSON.parse(find("maps-data").textContent);

  // The page opens first; the maps, most of its work, follow.
  if (document.readyState !== "complete") await new Promise((go) => addEventListener("load", go));
  await new Promise((go) => setTimeout(go));

  const places = Object.values(data.roots).map(find);
  const item = { docid: "maps", roots: data.roots, root_ids: Object.keys(data.roots) };
  const [views] = await Bokeh.embed.embed_items({ maps: data.document }, [item]);
  const plots = Bokeh.documents.at(-1).roots();
  const renderers = plots.flatMap((plot) => plot.renderers);
  const source = renderers[0].data_source;
  const rendererClass = (renderer) => Number(renderer.name.replace("class-", ""));

  const make = (tag, text) => {
    const element = document.createElement(tag);
    element.textContent = text;
    return element;
  };

  const makePicture = (point) => {
    const number = data.picture_of_point[point];
    if (number < 0) return null;
    const image = document.createElement("img");
    image.src = `data:image/webp;base64,${data.pictures[number]}`;
    image.alt = data.labels[data.class_of_point[point]];
    image.title = data.paths[point];
    return image;
  };

  // Colours: a canvas does not know the page's style sheet.
  const paint = (isPrinted) => {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const [ink, line] = isPrinted ? ["#000000", "#cccccc"] : [read("--ink"), read("--line")];
    const font = "system-ui, sans-serif";
    for (const plot of plots) {
      plot.outline_line_color = line;
      for (const axis of [...plot.below, ...plot.left]) {
        axis.setv({
          axis_label_text_color: ink,
          axis_label_text_font: font,
          axis_label_text_font_style: "normal",
          axis_line_color: line,
          major_label_text_color: ink,
          major_label_text_font: font,
          major_tick_line_color: line,
          minor_tick_line_color: null,
        });
      }
      for (const grid of plot.center) grid.setv({ grid_line_color: line, grid_line_alpha: 0.6 });
    }
  };
  paint(false);
  for (const plot of plots) plot.hold_render = false;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(false));

  // Legend
  const buttons = [...document.querySelectorAll("#legend .class")];
  const isMuted = (point) => buttons[data.class_of_point[point]].getAttribute("aria-pressed") === "false";
  // Of more than 144 classes, those that look the same fade together.
  const drawnWith = (button) => data.drawn_with[Number(button.dataset.class)];
  const mute = (changed, muted) => {
    const numbers = new Set(changed.map(drawnWith));
    for (const button of buttons) {
      if (numbers.has(drawnWith(button))) button.setAttribute("aria-pressed", String(!muted));
    }
    for (const renderer of renderers) if (numbers.has(rendererClass(renderer))) renderer.muted = muted;
    keepVisible();
  };
  const isShown = (button) => !button.parentElement.hidden;
  for (const button of buttons) {
    button.addEventListener("click", () => mute([button], button.getAttribute("aria-pressed") === "true"));
  }
  find("legend-all").addEventListener("click", () => mute(buttons.filter(isShown), false));
  find("legend-none").addEventListener("click", () => mute(buttons.filter(isShown), true));
  find("legend-filter").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLocaleLowerCase();
    for (const button of buttons) {
      button.parentElement.hidden = !button.textContent.toLocaleLowerCase().includes(wanted);
    }
    find("legend-empty").hidden = buttons.some(isShown);
  });

  // Selection: one source for all maps, so what is selected in one is selected in the other.
  const select = (points) => {
    source.selected.indices = points;
  };
  const keepVisible = () => {
    const kept = source.selected.indices.filter((point) => !isMuted(point));
    if (kept.length < source.selected.indices.length) select(kept);
  };
  const describeSelection = (points) => {
    if (points.length === 0) return find("search").value.trim() ? "No image on the map has such a name." : "Nothing is selected.";
    const counts = new Map();
    for (const point of points) {
      const label = data.labels[data.class_of_point[point]];
      counts.set(label, (counts.get(label) ?? 0) + 1);
    }
    const most = [...counts].sort((a, b) => b[1] - a[1]);
    const listed = most.slice(0, 8).map(([label, n]) => `\u2068${label}\u2069: ${n.toLocaleString("en")}`).join(", ");
    const rest = most.length > 8 ? ` and ${most.length - 8} more classes` : "";
    return `${points.length.toLocaleString("en")} selected: ${listed}${rest}.`;
  };
  const spread = (all, n) => all.filter((_, place) => Math.floor((place * n) / all.length) !== Math.floor(((place - 1) * n) / all.length));
  const showPictures = (points) => {
    const pictured = points.filter((point) => data.picture_of_point[point] >= 0);
    const shown = points.length === 1 ? points : spread(pictured, MAX_PICTURES);
    find("selection-pictures").replaceChildren(
      ...shown.map((point) => {
        const item = document.createElement("li");
        const caption = make("span", data.paths[point]);
        caption.className = "tag path";
        const picture = makePicture(point);
        if (picture) {
          const button = make("button", "");
          Object.assign(button, { type: "button", className: "picture", ariaHasPopup: "dialog" });
          button.dataset.path = data.paths[point];
          button.append(picture);
          item.append(button);
        }
        item.append(caption);
        return item;
      }),
    );
    return shown.length < points.length ? ` ${shown.length} of them are shown.` : "";
  };
  const showSelection = () => {
    keepVisible();
    const points = source.selected.indices;
    find("selection-text").textContent = describeSelection(points) + showPictures(points);
    find("selection-done").textContent = "";
    for (const id of ["selection-copy", "selection-download", "selection-clear"]) find(id).disabled = points.length === 0;
  };
  const say = (text) => {
    find("selection-done").textContent = text;
  };
  find("selection-copy").addEventListener("click", async () => {
    const paths = source.selected.indices.map((point) => data.paths[point]);
    const isCopied = await copy(paths.join("\n"));
    say(isCopied ? `${paths.length.toLocaleString("en")} copied.` : "The browser does not let this page copy; download them.");
  });
  find("selection-download").addEventListener("click", () => {
    const points = [...source.selected.indices].sort((a, b) => a - b);
    const rows = points.map((point) => formatRow(data.paths[point], data.labels[data.class_of_point[point]]));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["path,label\r\n", ...rows], { type: "text/csv" }));
    link.download = "selected.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`${points.length.toLocaleString("en")} written to selected.csv.`);
  });
  const names = data.paths.map((path, point) => `${path}\n${data.labels[data.class_of_point[point]]}`.toLocaleLowerCase());
  find("search").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLocaleLowerCase();
    select(wanted ? names.flatMap((name, point) => (name.includes(wanted) ? [point] : [])) : []);
    showSelection();
  });
  source.selected.properties.indices.change.connect(() => {
    showSelection();
    // A finger cannot hover: what it taps is shown where it is.
    if (pointer.isTap) showTip(source.selected.indices.at(-1));
  });
  find("selection-clear").addEventListener("click", () => {
    find("search").value = "";
    select([]);
    showSelection();
  });

  // The box beside the pointer
  const tip = find("tip");
  const pointer = { x: 0, y: 0, type: "mouse", isTap: false };
  const hits = new Map();
  const placeTip = () => {
    const { width, height } = tip.getBoundingClientRect();
    const right = pointer.x + 16;
    const left = right + width < innerWidth - 8 ? right : Math.max(8, pointer.x - 16 - width);
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.min(Math.max(8, pointer.y - height / 2), Math.max(8, innerHeight - height - 8))}px`;
  };
  const showTip = (point) => {
    tip.hidden = point === undefined;
    if (tip.hidden) return;
    const label = make("b", data.labels[data.class_of_point[point]]);
    tip.replaceChildren(...[makePicture(point), label, make("span", data.paths[point])].filter(Boolean));
    placeTip();
  };
  const showHit = () => {
    // Of overlapping points, choose the one on top: it was drawn last.
    const point = [...hits.values()].flat().filter((each) => !isMuted(each)).at(-1);
    hits.clear();
    // Bokeh treats a lifted finger like a pointer that leaves.
    if (pointer.type !== "touch") showTip(point);
  };
  source.inspect.connect(([renderer]) => {
    // Bokeh reports the renderers of a map one after the other.
    if (hits.size === 0) queueMicrotask(showHit);
    hits.set(renderer, [...source.inspected.indices]);
  });
  const hideTip = () => showTip(undefined);
  const follow = (event, isTap) => Object.assign(pointer, { x: event.clientX, y: event.clientY, type: event.pointerType, isTap });
  for (const place of places) {
    place.addEventListener("pointerdown", (event) => follow(event, event.pointerType === "touch"), true);
    place.addEventListener("pointermove", (event) => {
      const isFar = Math.hypot(event.clientX - pointer.x, event.clientY - pointer.y) > 8;
      follow(event, pointer.isTap && !isFar);
    }, true);
    place.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") hideTip();
    });
  }
  addEventListener("scroll", hideTip, { passive: true });

  // A finger scrolls the page past the maps until a tool is chosen; a mouse may move the map at once.
  if (matchMedia("(pointer: fine)").matches) {
    for (const plot of plots) plot.toolbar.tools.find((tool) => tool.type === "PanTool").active = true;
  }

  // Paper is white, and printing does not wait for the next frame.
  addEventListener("beforeprint", () => {
    paint(true);
    for (const plot of plots) views.get(plot).repaint();
  });
  addEventListener("afterprint", () => paint(false));
  document.documentElement.dataset.maps = "ready";
};

if (document.getElementById("maps-data")) showMaps();
