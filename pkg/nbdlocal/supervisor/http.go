package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	maxRequestBytes = 1 << 20
	// shutdownPatience is how long answers under way may take when a supervisor ends.
	shutdownPatience = 5 * time.Second
)

// serveAPI serves the API until ctx ends or a client stops the supervisor.
func (s *Supervisor) serveAPI(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelWarn),
		// Requests end with the supervisor, which then answers them.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("supervisor: serve API: %w", err)
	case <-ctx.Done():
	}
	s.closeDoor()
	shutdownCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownPatience)
	defer cancel()
	if err := server.Shutdown(shutdownCtx); err != nil {
		s.cfg.Log.Warn("clients left without an answer", "error", err)
		server.Close()
	}
	return nil
}

// closeDoor takes the API's socket away from new clients. The lock is still held, so
// that it cannot be a successor's.
func (s *Supervisor) closeDoor() { _ = os.Remove(SocketPath(s.cfg.StateDir)) }

func (s *Supervisor) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := f(r)
			if err != nil && s.ctx.Err() != nil && errors.Is(err, context.Canceled) {
				err = errStopping
			}
			respond(w, answer, err)
		})
	}
	handle("POST /v1/attachments", func(r *http.Request) (any, error) {
		var req AttachRequest
		if err := json.NewDecoder(io.LimitReader(r.Body, maxRequestBytes)).Decode(&req); err != nil {
			return nil, fmt.Errorf("attach: request body: %w: %w", err, block.ErrInvalid)
		}
		return s.attach(r.Context(), req)
	})
	handle("GET /v1/attachments", func(*http.Request) (any, error) {
		return s.list(), nil
	})
	handle("GET /v1/attachments/{id}", func(r *http.Request) (any, error) {
		return s.get(r.PathValue("id"))
	})
	handle("GET /v1/attachments/{id}/stats", func(r *http.Request) (any, error) {
		return s.stats(r.Context(), r.PathValue("id"))
	})
	handle("POST /v1/attachments/{id}/resize", func(r *http.Request) (any, error) {
		return s.resize(r.Context(), r.PathValue("id"))
	})
	handle("POST /v1/attachments/{id}/upgrade", func(r *http.Request) (any, error) {
		var req UpgradeRequest
		if err := decodeOptional(r, &req); err != nil {
			return nil, fmt.Errorf("upgrade: %w", err)
		}
		return s.upgrade(r.Context(), r.PathValue("id"), req)
	})
	handle("POST /v1/upgrade", func(r *http.Request) (any, error) {
		var req UpgradeRequest
		if err := decodeOptional(r, &req); err != nil {
			return nil, fmt.Errorf("upgrade: %w", err)
		}
		return s.upgradeAll(r.Context(), req)
	})
	handle("POST /v1/attachments/{id}/limits", func(r *http.Request) (any, error) {
		var req LimitsRequest
		if err := json.NewDecoder(io.LimitReader(r.Body, maxRequestBytes)).Decode(&req); err != nil {
			return nil, fmt.Errorf("limits: request body: %w: %w", err, block.ErrInvalid)
		}
		return s.limits(r.Context(), r.PathValue("id"), req)
	})
	handle("GET /v1/attachments/{id}/debug", func(r *http.Request) (any, error) {
		return s.debug(r.Context(), r.PathValue("id"))
	})
	handle("DELETE /v1/attachments/{id}", func(r *http.Request) (any, error) {
		force, err := parseForce(r.URL.Query().Get("force"))
		if err != nil {
			return nil, err
		}
		return struct{}{}, s.detach(r.Context(), r.PathValue("id"), force)
	})
	handle("GET /v1/status", func(r *http.Request) (any, error) {
		return s.status(r.Context()), nil
	})
	mux.HandleFunc("POST /v1/stop", func(w http.ResponseWriter, r *http.Request) {
		var req stopRequest
		err := decodeOptional(r, &req)
		if err == nil {
			err = s.prepareStop(req.Keep)
		}
		if err == nil {
			s.closeDoor() // who asks after this answer shall not find us
		}
		respond(w, struct{}{}, err)
		if err == nil {
			s.stop()
		}
	})
	for _, extra := range s.extra {
		mux.Handle(extra.pattern, extra.handler)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		respond(w, nil, fmt.Errorf("%s %.200q is no operation of this supervisor: %w", r.Method, r.URL.EscapedPath(), block.ErrUnsupported))
	})
	return mux
}

// decodeOptional decodes a request's body, if it has one.
func decodeOptional(r *http.Request, into any) error {
	err := json.NewDecoder(io.LimitReader(r.Body, maxRequestBytes)).Decode(into)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("request body: %w: %w", err, block.ErrInvalid)
	}
	return nil
}

func parseForce(value string) (bool, error) {
	if value == "" {
		return false, nil
	}
	force, err := strconv.ParseBool(value)
	if err != nil {
		return false, fmt.Errorf("detach: force=%.20q: want true or false: %w", value, block.ErrInvalid)
	}
	return force, nil
}

// respond sends an answer, or an error if there is one.
func respond(w http.ResponseWriter, answer any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if wire := toWire(err); wire != nil {
		w.WriteHeader(wire.httpStatus())
		answer = wire
	}
	_, _ = w.Write(append(marshal(answer), '\n')) // a client that is gone needs none
}
