"""Holds the style sheet of the page; its colours are the variables of `_svg`."""

from typing import Final

CSS: Final = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.55 Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1000px;margin:0 auto;padding:56px 24px 80px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:21px;letter-spacing:-.01em;margin:64px 0 10px}
h3{font-size:13px;font-weight:600;margin:0}
p{margin:8px 0;max-width:44em}
.lede{color:var(--muted);margin:0 0 32px;max-width:none;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:14px}
.card{border:1px solid var(--grid);border-top:3px solid var(--tone);border-radius:8px;
 padding:14px 16px 15px}
.card h3{color:var(--tone)}
.card strong{display:block;font-size:32px;line-height:1.25;letter-spacing:-.02em;font-weight:650;
 font-variant-numeric:tabular-nums}
.card span{display:block;font-size:13px;color:var(--muted)}
.grown{--tone:var(--arm-grown)}.host{--tone:var(--arm-host)}
.uniform{--tone:var(--arm-uniform)}.random{--tone:var(--arm-random)}.static{--tone:var(--arm-static)}
.card.grown{background:color-mix(in srgb,var(--arm-grown) 7%,transparent)}
.arm{color:var(--tone);font-weight:600}
.facts{list-style:none;display:flex;flex-wrap:wrap;gap:6px 28px;margin:18px 0 0;padding:0;
 color:var(--muted);font-size:14px}
.facts b{color:var(--ink);font-variant-numeric:tabular-nums}
.verdict{border-left:3px solid var(--arm-grown);padding:2px 0 2px 18px;margin:34px 0 0}
.verdict p:first-child{font-size:19px;line-height:1.45}
.verdict p{color:var(--muted)}
.verdict p:first-child{color:var(--ink)}
figure{margin:44px 0 0}
figure svg{display:block;width:101.6%;margin-left:-.8%;height:auto;overflow:visible}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{font-family:inherit!important}
figcaption{color:var(--muted);font-size:14px;margin-top:8px;max-width:52em}
.scroll{overflow:auto;max-height:560px;border:1px solid var(--grid);border-radius:8px}
.scroll table{margin:0}
.scroll th{position:sticky;top:0;background:var(--paper)}
.scroll table{font-size:13px}
.scroll th,.scroll td{padding:5px 8px 5px 10px;white-space:nowrap}
.scroll td:last-child{white-space:normal;min-width:150px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;width:100%;margin-top:12px}
th{text-align:left;font-weight:600;font-size:12.5px;color:var(--muted)}
th,td{padding:6px 12px 6px 0;border-bottom:1px solid var(--grid);vertical-align:top}
td.num,th.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.stage{white-space:nowrap}
.stage i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px;
 vertical-align:-1px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:0 56px}
dl{display:grid;grid-template-columns:minmax(110px,auto) 1fr;gap:4px 18px;font-size:14px;
 margin:8px 0}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:64px;color:var(--muted);font-size:13px}
@media(max-width:640px){main{padding:28px 14px 48px}h1{font-size:26px}
 figure{overflow-x:auto}figure svg{min-width:680px}}
@media print{.scroll{max-height:none;overflow:visible}figure,.card{break-inside:avoid}}
"""
