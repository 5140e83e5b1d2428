# The same commands as on a machine of one's own: docker build -t molf . && docker run -it -v molf:/molf molf
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /molf
# The environment is a layer of its own: a change in the code does not install it again.
COPY pyproject.toml constraints.txt Makefile README.md ./
COPY src/molf/__init__.py src/molf/__init__.py
RUN make install
COPY . .
# DVC needs a git repository; a build from an archive, or with .git left out, gets an empty one.
RUN git init --quiet
ENTRYPOINT ["make"]
CMD ["run"]
