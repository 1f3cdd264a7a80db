package broker

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

const (
	// registryStream is the stream behind the bucket SESSIONS (ADR-8 of NATS).
	registryStream = "KV_" + registryBucket
	// projectionBucket is the KV bucket of the projectors' checkpoints; the key of a log stream's is its name.
	projectionBucket = "PROJECTION"
	// listingKey is the key, there, of the secret that listings' tokens are sealed with.
	listingKey = "listing-secret"
)

// Bounds of one listing.
const (
	maxListed = 1000
	// maxScanned is how many records are looked at, whosever they are, before the page is ended, full or not.
	maxScanned = 20_000
	scanBatch  = 256
	scanBytes  = 512 << 10
)

func registrySubject(ln lane) string { return "$KV." + registryBucket + "." + ln.registryKey() }

// recordOf is what the registry says of a session in this state.
func recordOf(id schema.SessionID, st *state) *schema.SessionRecord {
	return &schema.SessionRecord{
		Tenant: id.Tenant, Session: id.Name, Epoch: st.epoch, Kind: st.kind, Status: st.status, HeadSeq: st.head,
		Created: timestamppb.New(st.created), Updated: timestamppb.New(st.updated), MetadataJson: st.metadata, Through: st.frame,
	}
}

// listSessions is a page of a tenant's sessions, in the order of the registry's last writes: the longest unchanged first. A session that changes while it is being listed may come twice, none is left out. A page may
// be short, even empty, and not be the last.
//
// The registry is read in its own order and filtered here: a filter by tenant would make the server scan it, unboundedly, under a lock, from 65,536 sessions on. The token is the place in it, sealed
// because it counts all tenants' sessions (I9).
func (r *reader) listSessions(ctx context.Context, tenant string, q Query) (SessionPage, error) {
	if q.Limit < 1 || q.Limit > maxListed {
		return SessionPage{}, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A listing has 1 to %d sessions, not %d.", maxListed, q.Limit)
	}
	sealer, err := r.sealer(ctx)
	if err != nil {
		return SessionPage{}, err
	}
	from := uint64(1)
	if q.Token != "" {
		if from, err = sealer.open(tenant, q.Token); err != nil {
			return SessionPage{}, err
		}
	}
	var page SessionPage
	prefix := "$KV." + registryBucket + "." + schema.EscapeToken(tenant) + "."
	for scanned := 0; scanned < maxScanned; {
		batch, more, err := r.scan(ctx, registryStream, from)
		if err != nil {
			return SessionPage{}, err
		}
		scanned += len(batch)
		for _, m := range batch {
			from = m.seq + 1
			if s := sessionIn(m, prefix, q); s != nil {
				page.Sessions = append(page.Sessions, s)
			}
			if len(page.Sessions) == q.Limit {
				// Also where this was the last of them: what stands behind it may be another tenant's, and is not to be told (I9).
				page.Next = sealer.seal(tenant, from)
				return page, nil
			}
		}
		if !more {
			return page, nil
		}
	}
	page.Next = sealer.seal(tenant, from)
	return page, nil
}

// sessionIn is the session that a record of the registry is about, where it is one that is asked for.
func sessionIn(m *stored, prefix string, q Query) *schema.Session {
	if !strings.HasPrefix(m.subject, prefix) || m.header.Get("KV-Operation") != "" {
		return nil
	}
	var record schema.SessionRecord
	if proto.Unmarshal(m.data, &record) != nil || !strings.HasPrefix(record.GetSession(), q.Prefix) {
		return nil
	}
	if q.Status != schema.Status_STATUS_UNSPECIFIED && record.GetStatus() != q.Status || q.May != nil && !q.May(record.GetSession()) {
		return nil
	}
	return &schema.Session{
		Session: record.GetSession(), Epoch: record.GetEpoch(), Kind: kindOf(record.GetKind()), Status: record.GetStatus(), HeadSeq: record.GetHeadSeq(),
		Created: record.GetCreated(), Updated: record.GetUpdated(), MetadataJson: record.GetMetadataJson(),
	}
}

// scan reads messages of a stream in their order, from a sequence on, about scanBatch at once. more: there are others behind them.
func (r *reader) scan(ctx context.Context, stream string, from uint64) (batch []*stored, more bool, err error) {
	select {
	case r.gets <- struct{}{}:
		defer func() { <-r.gets }()
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	limited, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	inbox := r.nc.NewInbox()
	sub, err := r.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, false, unreadable(err)
	}
	defer func() { _ = sub.Unsubscribe() }() // fails only where the connection is closed, and the subscription with it
	body := fmt.Sprintf(`{"seq":%d,"batch":%d,"max_bytes":%d}`, from, scanBatch, scanBytes)
	if err := r.nc.PublishRequest("$JS.API.DIRECT.GET."+stream, inbox, []byte(body)); err != nil {
		return nil, false, unreadable(err)
	}
	for {
		m, err := sub.NextMsgWithContext(limited)
		if err != nil {
			if ctx.Err() != nil {
				return nil, false, ctx.Err()
			}
			return nil, false, unreadable(err)
		}
		switch status := m.Header.Get("Status"); status {
		case "":
			s, err := storedOf(m)
			if err != nil {
				return nil, false, err
			}
			batch = append(batch, s)
		case "204":
			pending, err := strconv.ParseUint(m.Header.Get("Nats-Num-Pending"), 10, 64)
			return batch, err == nil && pending > 0, nil
		case "404":
			return batch, false, nil
		default:
			return nil, false, unreadable(fmt.Errorf("status %s %s", status, m.Header.Get("Description")))
		}
	}
}

// sealer is what tokens are sealed with. All edges of a deployment use the same secret, which the broker makes.
func (r *reader) sealer(ctx context.Context) (*tokenSealer, error) {
	if t := r.tokens.Load(); t != nil {
		return t, nil
	}
	m, err := r.last(ctx, "KV_"+projectionBucket, "$KV."+projectionBucket+"."+listingKey)
	if err != nil {
		return nil, err
	}
	if m == nil {
		return nil, schema.Refuse(schema.Code_CODE_UNAVAILABLE, "Sessions cannot be listed yet; start `tidemark broker`, which keeps the registry.")
	}
	t, err := newTokenSealer(m.data)
	if err != nil {
		return nil, err
	}
	r.tokens.Store(t)
	return t, nil
}

// tokenSealer turns a place in the registry into a token that tells nothing, and is good for one tenant.
type tokenSealer struct{ aead cipher.AEAD }

const listingSecretBytes = 32

func newListingSecret() []byte {
	secret := make([]byte, listingSecretBytes)
	rand.Read(secret) // never fails
	return secret
}

func newTokenSealer(secret []byte) (*tokenSealer, error) {
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "The secret of the listings is damaged.", Err: err}
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "The secret of the listings is damaged.", Err: err}
	}
	return &tokenSealer{aead}, nil
}

func (t *tokenSealer) seal(tenant string, place uint64) string {
	sealed := t.aead.Seal(nil, nil, binary.BigEndian.AppendUint64(nil, place), []byte(tenant))
	return base64.RawURLEncoding.EncodeToString(sealed)
}

func (t *tokenSealer) open(tenant, token string) (uint64, error) {
	sealed, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		var place []byte
		if place, err = t.aead.Open(nil, nil, sealed, []byte(tenant)); err == nil && len(place) == 8 {
			return binary.BigEndian.Uint64(place), nil
		}
	}
	return 0, &schema.Refusal{Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The page token is not one of this deployment's; begin the listing again without one.", Err: err}
}
