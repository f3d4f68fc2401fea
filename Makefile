# `make help` lists the targets. Variables are given on the command line, in upper or
# lower case: make train GPU=1 tensorboard_port=6007 ARGS="texts.csv --n-epochs 3"

gpu ?= 0
GPU ?= $(gpu)
tensorboard_port ?= 6006
TENSORBOARD_PORT ?= $(tensorboard_port)
api_port ?= 5000
API_PORT ?= $(api_port)
models_dir ?= models
MODELS_DIR ?= $(models_dir)

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/installed
# Epochs, port and model of the demo; SERVE=0 ends it after one request.
N ?= 5
PORT ?= 5000
SERVE ?= 1
PEERS_PYTHON ?= .peers/bin/python
DEMO_MODEL := minilm_L-6_H-384_A-12

export MODELS_DIR PORT PEERS_PYTHON
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu bench_serve bench_train endurance lint clean
.PHONY: build_dev build_api api_model train start_api

help: ## this list
	@sed -n 's/^\([a-z_-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-11s  %s\n", $$1, $$2 }'

# --- without Docker -----------------------------------------------------------------

venv: $(STAMP) ## set up .venv with the pinned requirements

# The stamp comes last, so an interrupted set-up starts again from an empty folder.
$(STAMP): requirements.txt requirements-serve.txt build-constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 to 3.13, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@rm -f $@
	@$(PYTHON) -m venv --clear .venv || { echo "python has no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "installing the requirements into .venv: about two minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade --constraint build-constraints.txt pip
	@$(PY) -m pip install --quiet --build-constraint build-constraints.txt --requirement requirements.txt
	@touch $@

demo: $(STAMP) ## fine-tune a small BERT and serve it on PORT=5000 (SERVE=0: one request)
	@$(PY) bertflask.py fetch $(DEMO_MODEL) --models-dir "$(MODELS_DIR)"
	@result=$$($(PY) bertflask.py train docstrings --model-name $(DEMO_MODEL) --n-epochs $(N) --models-dir "$(MODELS_DIR)") || exit; \
	  printf '%s\n' "$$result"; printf '%s\n' "$$result" | $(PY) -c "$$TELL_RESULT"
ifeq ($(SERVE),0)
	@$(PY) -c "$$ASK_ONCE"
else
	@echo "when the server is ready, in another terminal:"
	@echo "  curl http://127.0.0.1:$(PORT)/predict -d '{\"x\": [\"Return the shape of an array.\"]}'"
	@exec $(PY) bertflask.py serve --port $(PORT) --models-dir "$(MODELS_DIR)"
endif

test: $(STAMP) ## run the tests, all but those marked slow or gpu
	@$(PY) -m pytest $(ARGS)

test-slow: $(STAMP) ## run the tests marked slow: real models, a browser, minutes
	@$(PY) -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP) ## run the tests marked gpu
	@$(PY) -m pytest -m gpu $(ARGS)

bench_serve: $(STAMP) ## measure speed beside other servers: PEERS_PYTHON=.peers/bin/python
	@$(PY) bench.py serve $(ARGS)
	@$(PY) bench.py bulk $(ARGS)
	@$(PY) bench.py large $(ARGS)

bench_train: $(STAMP) ## measure training beside Hugging Face's Trainer
	@$(PY) bench.py train $(ARGS)

endurance: $(STAMP) ## overload a server for a minute: ARGS="--seconds 600"
	@$(PY) bench.py endurance $(ARGS)

lint: $(STAMP) ## check style and format with ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

clean: ## remove .venv and caches, not the models
	rm -rf .venv .api_model .pytest_cache .ruff_cache .hypothesis __pycache__

# --- with Docker --------------------------------------------------------------------

# $(call need_docker,what to run where there is none)
need_docker = @command -v docker >/dev/null && docker info >/dev/null 2>&1 || { \
  echo "docker is missing or does not answer; without Docker: $(1)" >&2; exit 1; }
# $(call need_image,name,target)
need_image = @docker image inspect $(1) >/dev/null 2>&1 || { \
  echo "there is no image $(1) yet: make $(2)" >&2; exit 1; }
tty = $$(test -t 0 && test -t 1 && echo --interactive --tty)

build_dev: ## build the training image, bertflask-dev
	$(call need_docker,make venv)
	docker build --target dev --tag bertflask-dev $(ARGS) .

build_api: ## build the serving image, bertflask-api, with the latest model in it
	$(call need_docker,make venv && $(PY) bertflask.py serve)
	@$(MAKE) --no-print-directory api_model
	docker build --target api --tag bertflask-api $(ARGS) .

# Only what serving reads of the latest run goes into the image.
api_model:
	@$(PYTHON) -c "$$COPY_LATEST_RUN"

train: ## fine-tune in Docker, TensorBoard beside it: GPU=0 TENSORBOARD_PORT=6006
	$(call need_docker,make venv && $(PY) bertflask.py train $(ARGS))
	$(call need_image,bertflask-dev,build_dev)
	@mkdir -p "$(MODELS_DIR)"
	@gpus="$(GPU:%=--gpus device=%)"; \
	if test -n "$$gpus" && ! docker run --rm $$gpus --entrypoint true bertflask-dev 2>/dev/null; then \
	  echo "docker offers no GPU $(GPU): training on the CPU (GPU= says so without trying)" >&2; gpus=; fi; \
	echo "TensorBoard while it trains: http://localhost:$(TENSORBOARD_PORT)"; \
	exec docker run --rm --init $(tty) $$gpus --user "$$(id -u):$$(id -g)" \
	  --publish $(TENSORBOARD_PORT):6006 --volume "$(CURDIR):/bertflask" \
	  --volume "$$(cd "$(MODELS_DIR)" && pwd):/bertflask/models" \
	  bertflask-dev python bertflask.py train $(ARGS)

start_api: ## serve the model of bertflask-api in Docker: api_port=5000
	$(call need_docker,make venv && $(PY) bertflask.py serve --port $(API_PORT) $(ARGS))
	$(call need_image,bertflask-api,build_api)
	@echo "curl http://localhost:$(API_PORT)/predict -d '{\"x\": [\"a text\"]}'"
	@exec docker run --rm $(tty) --read-only --tmpfs /tmp --publish $(API_PORT):5000 \
	  bertflask-api serve --host 0.0.0.0 --port 5000 $(ARGS)

# --- the Python in the recipes above ------------------------------------------------

define CHECK_PYTHON
import sys
if not (3, 11) <= sys.version_info < (3, 14):
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit("$(PYTHON) is Python " + found + ", needed is 3.11 to 3.13: make PYTHON=python3.12")
endef
export CHECK_PYTHON

define TELL_RESULT
import json, sys
result = json.loads(sys.stdin.read().splitlines()[-1])
print(f"test accuracy: {result['accuracy']:.4f}")
print(f"confusion matrix: {result['run_dir']}/confusion_matrix.png")
endef
export TELL_RESULT

# The server's own life and death: ready, one answer, SIGTERM, exit code 0.
define ASK_ONCE
import json, os, socket, subprocess, sys, time, urllib.request
port, models_dir = os.environ["PORT"], os.environ["MODELS_DIR"]
with socket.socket() as probe:
    if not probe.connect_ex(("127.0.0.1", int(port))):
        sys.exit(f"port {port} is taken: make demo SERVE=0 PORT=5001")
ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
url = f"http://127.0.0.1:{port}"
serve = ["serve", "--port", port, "--models-dir", models_dir]
server = subprocess.Popen([sys.executable, "bertflask.py", *serve])
try:
    for _ in range(600):
        try:
            ask(url + "/health_check", timeout=5).close()
            break
        except OSError:
            if server.poll() is not None:
                sys.exit(f"the server ended with exit code {server.returncode}")
            time.sleep(0.1)
    else:
        sys.exit("the server is not ready after a minute")
    body = json.dumps({"x": ["Return the shape of an array."]})
    print(f"curl {url}/predict -d '{body}'")
    print(ask(url + "/predict", body.encode(), timeout=60).read().decode().strip())
    server.terminate()
    if server.wait(timeout=30):
        sys.exit(f"the server ended with exit code {server.returncode}")
    print("the server has shut down cleanly")
finally:
    if server.poll() is None:
        server.kill()
endef
export ASK_ONCE

define COPY_LATEST_RUN
import json, os, shutil, stat
from pathlib import Path
models_dir, latest_name = Path(os.environ["MODELS_DIR"]), "latest_model_config.json"
shutil.rmtree(".api_model", ignore_errors=True)
target = Path(".api_model")
if (models_dir / latest_name).exists():
    latest = json.loads((models_dir / latest_name).read_text())
    run_dir = models_dir / latest["model_dir"]
    config = json.loads((run_dir / "config.json").read_text())
    latest["model_dir"] = f"trained/{run_dir.name}"
    copy_dir = target / latest["model_dir"]
    copy_dir.mkdir(parents=True)
    names = {"config.json", "bert_config.json", "albert_config.json", *config["files"]}
    for name in sorted(names):
        if (run_dir / name).is_file():
            shutil.copy(run_dir / name, copy_dir)
    (target / latest_name).write_text(json.dumps(latest))
    print(f"for the image: {run_dir}")
else:
    print(f"no trained model in {models_dir}: the image has none, mount one at /bertflask/models")
endef
export COPY_LATEST_RUN
