# SPDX-License-Identifier: Apache-2.0
"""`vtclip serve`: a fitted run as a service and a page. Needs the extra "serve".

limits.py     what one request may cost, and the refusals in one line
predictor.py  what the service says of images: the run's answers as JSON-able values
uploads.py    a body that is bounded while it is read, and the images in it
work.py       how many requests are open, decoded and computed at once, and until when
guard.py      around every request: Host, Origin, headers, one line of log, no traceback
schema.py     the shapes of the answers, for the OpenAPI description
app.py        the endpoints
pages.py      the files of page/, and a description of the endpoints without scripts
server.py     the socket, slow clients, signals
"""
