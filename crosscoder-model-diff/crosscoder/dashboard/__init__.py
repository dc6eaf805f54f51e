"""The dashboard of a dictionary's latents: one HTML file that needs no server and no network.

    records.py    what a dashboard holds
    firings.py    one pass over an activation set: every firing of the latents that get examples
    examples.py   a latent's firings -> its examples, and the tokens that it fires on
    builder.py    an opened crosscoder -> a Dashboard
    encoding.py   a Dashboard -> compact JSON
    page.py       the JSON, and the template's files -> one HTML file
    template/     the page: HTML, CSS and plain JavaScript

`python -m crosscoder.dashboard FinQA-mini pocket-mistral` builds that of the demo.
"""
