"""How weights are made of factors, for tests: a form and the shapes of its factors by rank."""

from collections.abc import Callable

from onnxlr.decompose import Form

# The weight has 8 outputs and 24 inputs.
FORMS: dict[str, tuple[Form, Callable[[int], tuple[tuple[int, ...], ...]]]] = {
    "channel": (Form("rsp,tr->tsp"), lambda r: ((r, 4, 6), (8, r))),
    "input-channel": (Form("rs,trp->tsp"), lambda r: ((r, 4), (8, r, 6))),
    "spatial": (Form("rsa,trb->tsab"), lambda r: ((r, 4, 2), (8, r, 3))),
    "tucker2": (Form("xs,yxp,ty->tsp"), lambda r: ((r, 4), (r, r, 6), (8, r))),
    "cp": (Form("rs,ra,rb,tr->tsab"), lambda r: ((r, 4), (r, 2), (r, 3), (8, r))),
    "tiles": (Form("jirsp,itjr->itjsp", outputs=2), lambda r: ((2, 2, r, 2, 6), (2, 4, 2, r))),
    "product": (Form("ar,rb->ba"), lambda r: ((24, r), (r, 8))),
}
