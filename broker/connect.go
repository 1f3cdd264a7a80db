package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// Server says which NATS server to use.
type Server struct {
	// URL of the server or servers, comma-separated; user and password may be in it.
	URL string
	// InProcess, where not nil, is an embedded server of this process, used instead of URL.
	InProcess interface{ InProcessConn() (net.Conn, error) }
	// User and Password, where the URL has none.
	User, Password string
	// Creds is a file with a NATS user's credentials; empty for none.
	Creds string
	// Name of this process, as the server's monitoring shows it.
	Name string
}

// connect opens a connection that reconnects for ever. The first attempt may fail: whoever starts a process against a server that is not there yet wants it to wait, so the caller asks
// Status.
func (s Server) connect(logger *slog.Logger, purpose string) (*connection, error) {
	c := new(connection)
	opts := []nats.Option{
		nats.Name(s.Name + " " + purpose),
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(true),
		nats.ReconnectWait(100 * time.Millisecond),
		nats.ReconnectJitter(50*time.Millisecond, 100*time.Millisecond),
		// Publishes are held by the appenders, which know what they hold; the client's own buffer would store them behind their back.
		nats.ReconnectBufSize(-1),
		nats.PingInterval(10 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			c.lost()
			if err != nil {
				logger.Warn("connection to NATS lost; reconnecting", "for", purpose, "error", err)
			}
		}),
		nats.ReconnectHandler(func(c *nats.Conn) {
			logger.Info("connected to NATS again", "for", purpose, "server", c.ConnectedServerName())
		}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			logger.Warn("NATS reported an error", "for", purpose, "error", err)
		}),
	}
	if s.InProcess != nil {
		opts = append(opts, nats.InProcessServer(s.InProcess))
	}
	if s.User != "" {
		opts = append(opts, nats.UserInfo(s.User, s.Password))
	}
	if s.Creds != "" {
		opts = append(opts, nats.UserCredentials(s.Creds))
	}
	var err error
	if c.Conn, err = nats.Connect(s.URL, opts...); err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Message: "The connection to NATS cannot be set up; check the server's address and credentials.", Err: err}
	}
	return c, nil
}

// Layout says which streams hold the sessions of this deployment.
type Layout struct {
	// Streams is how many log streams there are, 1 to 32, and as many page streams. Fixed when the deployment is created. Default 4, the best on 2 cores while still
	// sharing the work of recovery (NATS.md, finding 6).
	Streams int
	// Replicas of each stream: 1, or 3 or 5 where NATS is a cluster of at least so many servers. Default 1.
	Replicas int
	// MaxAge is how long envelopes are kept. Default 30 days.
	MaxAge time.Duration
	// MaxBytes bounds each log stream; 0 for no bound. When it is reached, the oldest envelopes go.
	MaxBytes int64
	// Durability is the class that the server's settings give to what it acknowledges. It is written into the streams' metadata, where edges read it. Default: replicated with
	// more than one replica, else os, which is all that a server of unknown settings is sure to give.
	Durability schema.Durability
}

const (
	metaStreams    = "tidemark.streams"
	metaDurability = "tidemark.durability"
	metaVersion    = "tidemark.version"
	// diskVersion is the version of what is on disk.
	diskVersion = "1"
	// maxStreams bounds Layout.Streams.
	maxStreams = 32
	// registryBucket is the KV bucket of the registry.
	registryBucket = "SESSIONS"
)

func (l *Layout) setDefaults() error {
	if l.Streams == 0 {
		l.Streams = 4
	}
	if l.Replicas == 0 {
		l.Replicas = 1
	}
	if l.MaxAge == 0 {
		l.MaxAge = 30 * 24 * time.Hour
	}
	if l.Durability == schema.Durability_DURABILITY_UNSPECIFIED {
		l.Durability = schema.Durability_DURABILITY_OS
		if l.Replicas > 1 {
			l.Durability = schema.Durability_DURABILITY_REPLICATED
		}
	}
	if l.Streams < 1 || l.Streams > maxStreams {
		return fmt.Errorf("broker: %d log streams are not possible; choose 1 to %d", l.Streams, maxStreams)
	}
	if l.Replicas != 1 && l.Replicas != 3 && l.Replicas != 5 {
		return fmt.Errorf("broker: %d replicas are not possible; choose 1, 3 or 5", l.Replicas)
	}
	if l.MaxAge < time.Minute {
		return fmt.Errorf("broker: envelopes cannot be kept for %s; the least is a minute", l.MaxAge)
	}
	return nil
}

// storage is where the class keeps what it stores.
func (l *Layout) storage() jetstream.StorageType {
	if l.Durability == schema.Durability_DURABILITY_MEMORY {
		return jetstream.MemoryStorage
	}
	return jetstream.FileStorage
}

// fits is nil where there is no deployment yet, or one that can become what the layout says.
func (l *Layout) fits(ctx context.Context, js jetstream.JetStream) error {
	s, err := js.Stream(ctx, logStreamName(0))
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	have := s.CachedInfo().Config
	if have.Storage != l.storage() {
		return fmt.Errorf("broker: the durability %s is not possible here: the deployment was made for another, and what is kept in memory cannot move to files, nor back; take one that fits, or another data directory",
			schema.DurabilityWord(l.Durability))
	}
	if n := have.Metadata[metaStreams]; n != fmt.Sprint(l.Streams) {
		return fmt.Errorf("broker: the deployment has %s log streams, the configuration says %d; the number cannot be changed once sessions are stored", n, l.Streams)
	}
	return nil
}

// provision creates the streams and buckets that are missing and brings the settings of the others up to date.
func provision(ctx context.Context, js jetstream.JetStream, l Layout) error {
	if err := l.setDefaults(); err != nil {
		return err
	}
	if err := l.fits(ctx, js); err != nil {
		return err
	}
	storage := l.storage()
	meta := map[string]string{metaStreams: fmt.Sprint(l.Streams), metaDurability: schema.DurabilityWord(l.Durability), metaVersion: diskVersion}
	_, err := js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: registryBucket, History: 1, Replicas: l.Replicas, Storage: storage, Description: "Tidemark's registry of sessions",
	})
	if err != nil {
		return fmt.Errorf("broker: bucket %s: %w", registryBucket, err)
	}
	if err := provisionPresence(ctx, js, l.Replicas); err != nil {
		return err
	}
	if err := provisionWork(ctx, js, l); err != nil {
		return err
	}
	if err := provisionTails(ctx, js, l); err != nil {
		return err
	}
	// LOG_00 comes last: whoever finds it finds the rest.
	for i := l.Streams - 1; i >= 0; i-- {
		base := jetstream.StreamConfig{
			Storage: storage, Replicas: l.Replicas, Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld,
			AllowDirect: true, Metadata: meta,
			// We do not use Msg-Id here; the default window of two minutes would be read back at every start (NATS.md, finding 4).
			Duplicates: 100 * time.Millisecond,
		}
		log := base
		log.Name, log.Subjects, log.MaxAge = logStreamName(i), streamSubjects("log", i, l.Streams), l.MaxAge
		// A tombstone rolls its session up.
		log.AllowRollup = true
		if log.MaxBytes = -1; l.MaxBytes > 0 {
			log.MaxBytes = l.MaxBytes
		}
		page := base
		page.Name, page.Subjects, page.MaxAge = pageStreamName(i), streamSubjects("page", i, l.Streams), l.MaxAge
		page.MaxMsgsPerSubject = 1
		for _, c := range []jetstream.StreamConfig{page, log} {
			if _, err := js.CreateOrUpdateStream(ctx, c); err != nil {
				return fmt.Errorf("broker: stream %s: %w", c.Name, err)
			}
		}
	}
	return nil
}

// streamSubjects are the subjects of stream i of n: one for each of its slices.
func streamSubjects(kind string, i, n int) []string {
	var subjects []string
	for slice := range sliceCount {
		if streamOf(slice, n) == i {
			subjects = append(subjects, kind+"."+sliceToken(slice)+".>")
		}
	}
	return subjects
}

// discover reads from the streams' metadata how the deployment is laid out. The error is unavailable while there is none.
func discover(ctx context.Context, js jetstream.JetStream) (streams int, d schema.Durability, err error) {
	s, err := js.Stream(ctx, logStreamName(0))
	if err != nil {
		r := &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Err: err, Message: "NATS has not said yet how the log is laid out; it is asked again."}
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			r.Message = "The log streams are not there yet; start `tidemark broker` against this NATS server, which creates them."
		}
		return 0, 0, r
	}
	c := s.CachedInfo().Config
	if _, err := fmt.Sscan(c.Metadata[metaStreams], &streams); err != nil || streams < 1 || streams > maxStreams {
		return 0, 0, schema.Refuse(schema.Code_CODE_INTERNAL, "Stream %s is not one of Tidemark's: its metadata says nothing of %s.", c.Name, metaStreams)
	}
	if v := c.Metadata[metaVersion]; v != diskVersion {
		return 0, 0, schema.Refuse(schema.Code_CODE_INTERNAL, "The log has version %q; this program knows version %s.", v, diskVersion)
	}
	return streams, schema.ParseDurability(strings.TrimSpace(c.Metadata[metaDurability])), nil
}
