"""What the endpoint takes for granted of vLLM; written against 0.32. Read the failure, then the module it names."""

import ast
import inspect
import textwrap

import pytest

pytestmark = pytest.mark.engine
WRITTEN_AGAINST = "0.32"


def test_the_version_is_the_one_this_was_written_against():
    import vllm

    assert vllm.__version__.startswith(WRITTEN_AGAINST), (
        f"vLLM is {vllm.__version__}, epd.endpoint was written against {WRITTEN_AGAINST}: check the tests below,"
        " then epd/endpoint/engine/*.py, epd/endpoint/http/{options,server}.py,"
        " epd/endpoint/media/{connector,decoding,parts,pictures,processor_cache,repeats,routes}.py and epd/multimodal/"
    )


def test_the_engine_core_is_made_in_one_place_by_keywords():
    from vllm.v1.engine.async_llm import AsyncLLM

    tree = ast.parse(textwrap.dedent(inspect.getsource(AsyncLLM.__init__)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (made,) = [call for call in calls if ast.unparse(call.func) == "EngineCoreClient.make_async_mp_client"]
    assert not made.args, "epd.endpoint.engine.engine_client substitutes it by a function of keywords"


def test_async_llm_asks_its_core_only_for_what_ours_or_the_base_has():
    from vllm.v1.engine import async_llm
    from vllm.v1.engine.core_client import EngineCoreClient

    from epd.endpoint.engine.engine_client import PipelineCore

    names = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(async_llm)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self.engine_core", "engine_core")
    }
    known = set(dir(PipelineCore)) | {"resources"}
    # Fault tolerance, which needs engines of this process; its routes are only there with --enable-fault-tolerance.
    assert names - known <= {"handle_fault", "get_status"}
    ours = {"add_request_async", "get_output_async", "abort_requests_async", "get_supported_tasks_async"}
    assert ours <= names and all(getattr(PipelineCore, n) is not getattr(EngineCoreClient, n) for n in ours)


def test_the_output_processor_has_what_failures_need():
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    assert list(inspect.signature(OutputProcessor.abort_requests).parameters) == ["self", "request_ids", "internal"]
    source = inspect.getsource(RequestOutputCollector.put)
    assert "isinstance(output, Exception)" in source, "an exception must take the place of what waits"


def test_the_id_of_a_child_holds_its_parents():
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.parallel_sampling import ParentRequest

    request = EngineCoreRequest("p-1", [1], None, SamplingParams(n=2), None, 0.0, None, None, None)
    request.external_req_id = "p"
    child, _ = ParentRequest(request).get_child_info(1)
    assert child == "1_p-1"


def test_the_fields_of_messages_are_there():
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

    assert {"mm_features", "sampling_params", "external_req_id", "cache_salt", "abort_immediately"} <= set(
        EngineCoreRequest.__struct_fields__
    )
    assert {"new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "events", "finish_reason"} <= set(
        EngineCoreOutput.__struct_fields__
    )


def test_the_app_can_get_middleware_after_it_was_built():
    from vllm.entrypoints.launchers import app

    source = inspect.getsource(app.build_app)
    assert "sagemaker_standards_bootstrap(app)" in source, "it builds the middleware stack, which we build again"


def test_every_item_of_a_request_is_named_in_one_place_before_the_cache_is_asked():
    from vllm.multimodal.processing.processor import BaseMultiModalProcessor
    from vllm.renderers.base import BaseRenderer

    source = inspect.getsource(BaseMultiModalProcessor._cached_apply_hf_processor)
    assert source.index("self._get_mm_hashes(inputs)") < source.index("self._get_cache_missing_items(")
    assert "cache.is_cached(hashes)" in inspect.getsource(BaseMultiModalProcessor._get_cache_missing_items)
    assert "cache.get_and_update_item(item, item_hash)" in inspect.getsource(BaseMultiModalProcessor._merge_mm_kwargs)
    source = inspect.getsource(BaseRenderer._process_multimodal)
    assert "self._process_mm_uuids(" in source and "self._mm_processor_cache" in source
    parameters = inspect.signature(BaseRenderer._process_mm_uuids).parameters
    assert list(parameters) == ["self", "mm_data", "mm_data_items", "mm_uuid_items", "mm_req_id"]
    assert "self._process_mm_uuids(" not in inspect.getsource(BaseRenderer).replace(source, "")


def test_what_is_left_of_known_pictures_is_what_vllm_does_last():
    from vllm.multimodal.processing.processor import BaseMultiModalProcessor, MultiModalProcessingResult
    from vllm.renderers.base import BaseRenderer

    assert MultiModalProcessingResult._fields == ("prompt_ids", "kwargs", "hashes", "prompt_updates")
    tree = ast.parse(textwrap.dedent(inspect.getsource(BaseRenderer._process_tokens_async)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "self._process_multimodal_async"]
    assert list(map(ast.unparse, call.args)) == ["prompt_token_ids", "multi_modal_data"]
    assert {"mm_processor_kwargs", "media_io_kwargs", "skip_mm_cache"} <= {each.arg for each in call.keywords}
    source = inspect.getsource(BaseMultiModalProcessor._cached_apply_hf_processor)
    assert "prompt_ids=self._postprocess_prompt(inputs.prompt)" in source
    assert "self._recompute_cached_prompt_update(update, item_idx)" in inspect.getsource(
        BaseMultiModalProcessor._merge_mm_kwargs
    )
    tree = ast.parse(textwrap.dedent(inspect.getsource(BaseMultiModalProcessor.apply)))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    steps = ["self._cached_apply_hf_processor", "self._maybe_apply_prompt_updates", "mm_input", "item.to_range"]
    assert sorted(calls) == sorted([*steps, "timing_ctx.record", "mm_placeholders.items"])


def test_pictures_come_through_the_connector_that_we_replace(monkeypatch):
    from vllm import envs
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    from epd.endpoint.media.connector import LimitedConnector
    from epd.endpoint.media.pictures import PictureIO

    monkeypatch.delenv("VLLM_MEDIA_CONNECTOR", raising=False)
    assert envs.VLLM_MEDIA_CONNECTOR == "http" and "http" in MEDIA_CONNECTOR_REGISTRY.name2class
    for name in (f"fetch_{each}_async" for each in ("image", "video", "audio")):
        ours, theirs = (inspect.signature(getattr(each, name)) for each in (LimitedConnector, MediaConnector))
        assert list(ours.parameters) == list(theirs.parameters)
    source = inspect.getsource(PictureIO.__mro__[1])
    assert source.count("self.load_bytes(") == 2, "base64 and files are read by load_bytes, which is ours"


def test_video_is_sampled_and_read_by_methods_of_the_loader():
    from vllm.multimodal.media.video import VideoMediaIO
    from vllm.multimodal.video_decoders import opencv

    assert "self.video_loader.load_bytes(" in inspect.getsource(VideoMediaIO.load_bytes)
    source = inspect.getsource(opencv.decode_opencv)
    assert "loader_cls.compute_frames_index_to_sample(" in source and "loader_cls.read_frames(" in source


def test_audio_is_loaded_by_a_function_with_bounds():
    from vllm.multimodal.media import audio

    wanted = {"sr", "max_duration_s", "max_decode_bytes", "backend"}
    assert wanted <= set(inspect.signature(audio.load_audio).parameters) and hasattr(audio, "AudioDecoder")
    # Without torchcodec, "auto" is soundfile and then PyAV: what `AudioIO` chooses from the first bytes.
    assert {"auto", "soundfile", "pyav"} <= set(audio.AUDIO_BACKENDS)


def test_the_way_audio_is_resampled_can_be_chosen():
    from vllm.multimodal.audio import AudioResampler
    from vllm.multimodal.parse import MultiModalDataParser

    assert MultiModalDataParser(target_sr=16_000).audio_resampler.method == "torchaudio"
    assert "soxr" in AudioResampler._METHODS
