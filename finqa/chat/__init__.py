"""Asks a model behind an OpenAI-compatible server, and keeps what was paid for.

config           how to ask: settings and flags
answer_journal   what was asked and answered
chat_request     one request, and what its outcome means
asking           many requests at once; throttle: how many
prices           what it costs, and will cost
"""
