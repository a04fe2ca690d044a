"""Notices: how a machine says that it is going away.

Usable without Keras, and imports nothing of the rest of the package:

```python
from resilient_ckpt.signals import NoticeListener, SignalSource

with NoticeListener([SignalSource()], on_notice=print):
    train()
```
"""

from resilient_ckpt.signals.listener import NoticeListener
from resilient_ckpt.signals.notice import NoticeKind, NoticeSource, PreemptionNotice
from resilient_ckpt.signals.os_signals import SignalSource

__all__ = [
    "NoticeKind",
    "NoticeListener",
    "NoticeSource",
    "PreemptionNotice",
    "SignalSource",
]
