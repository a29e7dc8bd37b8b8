"""An HTTP server that speaks OpenAI's protocol, on an engine that runs in a thread of its own.

limits      what a client may ask for, and how long it may take
errors      what a client is told
fields      fields of a body, each read once
schema      bodies to requests of the engine
holding     what they say of the positions of the answer
json_schema which schemas are honored
grammars    texts, expressions and schemas to automata of tokens
loop        the engine's thread, and how the event loop speaks with it
scoring     log-probabilities of prompts, for `echo`
text        tokens to text, piece by piece
answers     results to OpenAI's JSON
stream      server-sent events
metrics     counts and times, for Prometheus
connection  deadlines of connections, signals
app         the routes
page.html   the page that shows blocks as they are denoised
"""
