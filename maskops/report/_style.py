"""The page's style sheet: light and dark, from a phone to a desktop, and on paper."""

STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--soft:#57606a;--rule:#d8dee4;--card:#f6f8fa;--mark:#fff3cd;
--k0:#0068a5;--k1:#c24a00;--k2:#007a5a;--k3:#a8457f;
--s0:#e4edf6;--s1:#bfd8ec;--s2:#86b9dc;--s3:#4590c4;--s4:#1762a3;--s5:#062c5c}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--soft:#a4adb8;--rule:#363d46;--card:#1c2127;
--mark:#473c12;--k0:#6cb8f0;--k1:#ff9d5c;--k2:#4fd1a5;--k3:#f0a3cf;
--s0:#22303e;--s1:#24486b;--s2:#2a6ba3;--s3:#4a97d3;--s4:#8cc4ee;--s5:#e3f2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .75rem}
h2{font-size:1.2rem;margin:0 0 .5rem}
h3{font-size:1rem;margin:0}
h1,td,th,dd,li,p,summary{overflow-wrap:anywhere}
section{margin-top:2.5rem;padding-top:1.25rem;border-top:1px solid var(--rule)}
p{margin:.25rem 0 .75rem;max-width:46rem}
.lead{font-size:1.15rem}
.meanings,.note,figcaption p,small,footer{color:var(--soft);font-size:.875rem}
small{display:block}
.warning{background:var(--mark);padding:.5rem .75rem;border-radius:.4rem;margin-top:1rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.25rem 0 0}
.cards div{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:.7rem .9rem}
.cards dt{color:var(--soft);font-size:.875rem}
.cards dd{margin:.1rem 0 0;font-size:1.35rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.cards dd small{font-size:.8rem;font-weight:400}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1.5rem;align-items:start}
.figures>*{min-width:0}
figure{margin:0;max-width:31rem}
figure svg{display:block;width:100%;height:auto}
figcaption{margin-bottom:.5rem}
figcaption p{margin:.1rem 0 0}
.key{list-style:none;margin:.4rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.15rem 1rem;font-size:.875rem}
.key li{display:flex;align-items:center;gap:.4rem}
.key svg{width:2rem;height:.75rem;flex:none}
.key svg.small{width:1.25rem}
svg text{fill:var(--soft);font-size:11px}
svg .grid,svg .axis{stroke:var(--rule);fill:none}
svg .axis{stroke:var(--soft)}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.k0{stroke:var(--k0);fill:var(--k0)}.k1{stroke:var(--k1);fill:var(--k1)}
.k2{stroke:var(--k2);fill:var(--k2)}.k3{stroke:var(--k3);fill:var(--k3)}
.k0 text{fill:var(--ink);stroke:none}
.k1 .line{stroke-dasharray:7 3}.k2 .line{stroke-dasharray:2 3}.k3 .line{stroke-dasharray:9 3 2 3}
.ring{fill:var(--paper);stroke-width:2}
.s0,.s1,.s2,.s3,.s4,.s5{shape-rendering:crispEdges}
.s0{fill:var(--s0)}.s1{fill:var(--s1)}.s2{fill:var(--s2)}.s3{fill:var(--s3)}.s4{fill:var(--s4)}.s5{fill:var(--s5)}
.swatch{stroke:var(--soft);stroke-width:.5}
.empty{fill:none;stroke:var(--rule)}
.hover{fill:transparent}
.hover rect:hover{stroke:var(--ink)}
table{border-collapse:collapse;width:100%;max-width:31rem;font-size:.9375rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:.875rem;padding-bottom:.25rem}
th,td{padding:.35rem .75rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th{white-space:nowrap;color:var(--soft);font-weight:600;font-size:.875rem}
tbody th{font-weight:600}
tbody th small{font-weight:400}
.number{text-align:right;white-space:nowrap}
.differs{background:var(--mark)}
.differs th::before{content:"\\2022  "}
.scroll{overflow-x:auto;max-height:36rem;overflow-y:auto}
details{margin-top:1rem}
summary{cursor:pointer;color:var(--soft);font-size:.9375rem;padding:.25rem 0}
.strip{display:grid;grid-template-columns:repeat(6,1fr);gap:2%}
img{display:block;width:100%;height:auto;border:1px solid var(--rule);border-radius:.2rem}
.pixels{image-rendering:pixelated}
.patterns{display:grid;grid-template-columns:1fr 1fr;gap:1rem;max-width:34rem;align-items:end}
.images figure+figure{margin-top:.75rem}
.meanings{display:grid;grid-template-columns:auto 1fr;gap:.1rem .75rem;margin:.75rem 0 0}
.meanings dd{margin:0}
footer{margin-top:2.5rem;padding-top:1rem;border-top:1px solid var(--rule)}
@media (max-width:30rem){h1{font-size:1.25rem}.lead,.cards dd{font-size:1.05rem}
.cards div{padding:.6rem .7rem}}
@media print{section{break-inside:avoid}.scroll{max-height:none;overflow:visible}}
"""
