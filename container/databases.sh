#!/bin/sh
# A role and a database of its own for each service; PostgreSQL's image runs this once, on an empty volume.
set -eu
for name in mlflow prefect; do
    case $name in
        mlflow) PASSWORD=$MLFLOW_DB_PASSWORD ;;
        prefect) PASSWORD=$PREFECT_DB_PASSWORD ;;
    esac
    export PASSWORD  # by the environment: a command line is for all to see
    psql --quiet --no-psqlrc --username postgres --dbname postgres --set ON_ERROR_STOP=1 --set name="$name" <<'SQL'
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
SQL
done
