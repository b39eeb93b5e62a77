"""The public operations; importing this registers them with torch."""

from survfuse.ops.pool_bag import pool_bag
from survfuse.reference import pool_weights as _pw, tokens_attend_bag as _t, tokens_attend_bag_with_lse as _tl, tokens_attend_bag_weights as _tw

def _wrap(f):
    def g(*a, absorb="auto", backend=None, **k):
        return f(*a, **k)
    return g

pool_weights=_wrap(_pw)
tokens_attend_bag=_wrap(_t); tokens_attend_bag_with_lse=_wrap(_tl)
tokens_attend_bag_weights=_wrap(_tw)
