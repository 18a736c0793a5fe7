"""The studio: a page on which a person watches every frame of a video clear up.

session.py owns the model (no gradio), presets.py holds requests and words, ui.py is the page, static/ its script and style.
"""
