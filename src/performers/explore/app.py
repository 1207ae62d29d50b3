"""The page: its tabs, its looks, and the server that shows it to this computer alone."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from performers.explore.attention import attention_tab
from performers.explore.estimator import estimator_tab
from performers.explore.frontier import frontier_tab
from performers.explore.generation import generation_tab
from performers.explore.runs import runs_tab
from performers.explore.subject import Subject

__all__ = ["build", "serve"]

FONTS = ["system-ui", "sans-serif"]
MONO_FONTS = ["ui-monospace", "monospace"]

STYLE = """
.progress { display: block; margin: 0.5em 0 }
.progress progress { display: block; width: 100%; height: 0.75em; accent-color: #1d4ed8 }
.picture { overflow-x: auto }
.picture img { width: 100%; min-width: 44em; height: auto }
.wide { overflow-x: auto; margin-bottom: 1.5em }
.wide caption { padding-bottom: 0.3em; text-align: left }
td, th { overflow-wrap: normal; word-break: normal }
.written { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
"""


def _gradio() -> ModuleType:
    """Gradio, told before it starts that it shall speak to nobody.

    Raises ModuleNotFoundError where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ModuleNotFoundError(
            "the explorer needs gradio, which is not installed. Install it with: "
            "pip install 'performers[explore]'",
            name="gradio",
        ) from error
    return gradio


def build(subject: Subject, runs: Path) -> Any:
    """The page for a model, and for the runs in a folder.

    Raises ModuleNotFoundError where gradio is not installed, ValueError for a model that has no
    layer of self-attention.
    """
    gr = _gradio()
    with gr.Blocks(analytics_enabled=False, title="performers explore", fill_width=True) as page:
        gr.Markdown(f"# performers explore\n\n{subject.description}")
        with gr.Tab("Attention") as tab:
            attention_tab(gr, tab, subject)
        with gr.Tab("Estimator") as tab:
            estimator_tab(gr, tab)
        with gr.Tab("Error and cost") as tab:
            frontier_tab(gr, tab, subject)
        with gr.Tab("Runs") as tab:
            runs_tab(gr, tab, runs)
        with gr.Tab("Generation"):
            generation_tab(gr, subject)
    return page


def serve(page: Any, host: str, port: int | None, opens_browser: bool = False) -> str:
    """Begin to show the page, and return its address. `page.block_thread()` waits for Ctrl-C.

    `port`: None takes a free one.

    Raises OSError where the port is taken.
    """
    gr = _gradio()
    # The blue and the gray of the default have too little contrast to white for small letters.
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_600",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
    )
    _, address, _ = page.queue().launch(
        server_name=host,
        server_port=port,
        inbrowser=opens_browser,
        share=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        quiet=True,
        show_error=True,
        theme=theme,
        css=STYLE,
        prevent_thread_lock=True,
    )
    return str(address)
